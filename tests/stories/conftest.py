"""The fixtures of the stories in which hospitals train together."""

from __future__ import annotations

from joint_release_cases import approved, joint

__all__ = ["approved", "joint"]
