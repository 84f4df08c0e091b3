"""Processes that die, or disks that are full, at any one of their operations on files: counted, so that a test can go through them all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_OPERATIONS = ("open", "write", "fsync", "replace", "unlink", "mkdir")
_TAKE_SPACE = ("open", "write", "fsync", "mkdir")
_REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _OPERATIONS}


class Killed(BaseException):
    """As SIGKILL: nothing that catches errors sees it."""


@dataclass
class Point:
    """The `at`-th operation below `folder`. seen: name of the file of each operation so far."""

    folder: Path
    at: int
    full: bool
    seen: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something broke."""
        return len(self.seen) >= self.at

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Count an operation, and break there. A full disk stays full for all that takes space."""
        path = self._path(name, arguments)
        if not path.startswith(str(self.folder)):
            return
        self.seen.append(Path(path).name)
        if self.full and self.passed and name in _TAKE_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self.full and len(self.seen) == self.at:
            if name == "write":
                _REAL["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])  # a torn line
            raise Killed

    def _path(self, name: str, arguments: tuple[Any, ...]) -> str:
        if name in ("write", "fsync"):
            return str(Path(f"/proc/self/fd/{arguments[0]}").resolve())
        writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR)
        return str(arguments[0]) if writes else ""


@contextmanager
def breaking(folder: Path, at: int, *, full: bool) -> Iterator[Point]:
    """Within it, the process dies at the `at`-th operation on files below `folder`, or from there on its disk is full.

    Nothing is really synced: a process that dies loses nothing of what it wrote, and the test is many times faster.
    """
    point = Point(folder=folder.resolve(), at=at, full=full)

    def breaks(name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            point.before(name, arguments)
            return None if name == "fsync" else _REAL[name](*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, breaks(name))
        yield point
