"""The fixtures of federated tests."""

from __future__ import annotations

from federation_cases import empty, federation, new_world, public, world
from joint_release_cases import approved, joint

__all__ = ["approved", "empty", "federation", "joint", "new_world", "public", "world"]
