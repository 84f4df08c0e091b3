"""The fixtures of federated tests."""

from __future__ import annotations

from federation_cases import empty, federation, new_world, public, world

__all__ = ["empty", "federation", "new_world", "public", "world"]
