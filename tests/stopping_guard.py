"""A guard for tests: its keys are known, so that two studies can be compared bit by bit, and it stops at a place that a file names.

    python stopping_guard.py POLICY

The file `stop` beside the policy holds a place, as in "4 trained 6": in round 4, after step 6. When the guard comes there it writes
`stopped` and waits until that is removed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import federated.journal
import federated.site
from dpsynth.model.moment_release import QUERIES
from dpsynth.progress import Progress
from federated.cli import main
from federated.journal import Message
from federated.site import Guard

FOLDER = Path(sys.argv[1]).parent


def reached(place: str) -> None:
    """Stop here if this is the place."""
    wanted, stopped = FOLDER / "stop", FOLDER / "stopped"
    if wanted.is_file() and wanted.read_text() == place:
        wanted.unlink()
        stopped.write_text(place)
        while stopped.exists():
            time.sleep(0.02)


def stopping() -> None:
    """Put the places into the guard: before its charge, after it, after a step, and when the answer is kept and has not left."""
    allowed, answer, open_guard = Guard._allowed, Message.answer, Guard.open
    moments_round = federated.site.moments_round

    def asked(guard: Guard, request: Any) -> Any:
        reached(f"{request.round} asked")
        return allowed(guard, request)

    def charged(*arguments: Any, **options: Any) -> Any:
        reached(f"{QUERIES.index(options['mechanism'].queries[0].name)} charged")
        return moments_round(*arguments, **options)

    def answered(message: Message, digest: str, reply: bytes) -> None:
        answer(message, digest, reply)
        reached(f"{message.folder.name.split('-')[1]} answered")

    def stepped(purpose: str, step: int, total: int, note: str = "") -> None:
        reached(f"{purpose.rsplit(' ', 1)[-1]} trained {step}")

    def opened(policy: Any, **options: Any) -> Guard:
        progress: Progress = stepped
        return open_guard(policy, **{**options, "progress": progress})

    patches: dict[str, Callable[..., Any]] = {"_allowed": asked, "open": opened}
    for name, patch in patches.items():
        setattr(Guard, name, patch)
    federated.site.moments_round = charged
    Message.answer = answered  # type: ignore[method-assign]
    federated.journal.fresh_key = lambda: b"k" * 32


if __name__ == "__main__":
    stopping()
    sys.argv[1:] = ["serve", *sys.argv[1:]]
    main()
