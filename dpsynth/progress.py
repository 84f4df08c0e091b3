"""How long work tells how far it is. The work calls a function; the terminal draws the bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called by long work: `task` names the bar, `note` is a short text beside it such as the epsilon spent so far."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` are finished."""


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """The progress of tests and programs that want none."""


def say_nothing(_: str) -> None:
    """For callers who want no lines either."""


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Bars on standard error; plain lines at a tenth each when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars: dict[str, int] = {}
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as rich:

        def progress(task: str, done: int, total: int, note: str = "") -> None:
            if task not in bars:
                bars[task] = rich.add_task(task, total=total, note=note)
            rich.update(bars[task], completed=done, total=total, note=note)  # type: ignore[arg-type]
            if not console.is_terminal and total and (done == total or done * 10 // total != (done - 1) * 10 // total):
                console.print(f"{task}: {done}/{total} {note}".rstrip(), highlight=False)

        yield progress
