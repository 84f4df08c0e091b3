"""What a hospital should know before its guard listens: each finding is ok, a warning, or a reason not to start."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dpsynth.errors import DpsynthError
from dpsynth.policy_needs import missing
from dpsynth.progress import Progress
from federated.policy import SitePolicy, load_policy, own_file
from federated.site import Guard


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One question with its answer: state is ok, warning or error."""

    question: str
    state: str
    answer: str


def examine(policy_path: Path, *, progress: Progress) -> list[Diagnosis]:
    """Everything that can be examined without a coordinator; the data set is read once."""
    try:
        policy = load_policy(policy_path)
    except DpsynthError as error:
        return [Diagnosis(question="policy", state="error", answer=str(error))]
    found = [Diagnosis(question="policy", state="ok", answer=f"site {policy.site}, {len(policy.coordinators)} approved coordinators")]
    found += _files(policy_path, policy)
    if lacking := missing(policy.gate):
        found.append(Diagnosis(question="gate", state="error", answer=f"no candidates could be checked: {lacking}"))
    try:
        guard = Guard.open(policy, progress=progress)
        spent = guard.ledger.spent()
        found.append(
            Diagnosis(question="ledger", state="ok", answer=f"sound; {spent:.3f} of {policy.epsilon:g} spent at delta {policy.delta:g}")
        )
        guard.images  # noqa: B018 (reads the data set and compares it with the ledger)
        found.append(Diagnosis(question="data", state="ok", answer="the data set of the ledger, and delta is small enough for it"))
    except DpsynthError as error:
        found.append(Diagnosis(question="ledger and data", state="error", answer=str(error)))
    return found


def _files(policy_path: Path, policy: SitePolicy) -> list[Diagnosis]:
    found = []
    if own_file(policy_path):
        text = "the guard's user can write its own policy; give it to another user: chown root and chmod 644"
        found.append(Diagnosis(question="owner of the policy", state="warning", answer=text))
    places: tuple[tuple[str, Path | None], ...] = (("data", policy.data.path), ("ledger", policy.ledger), ("state", policy.state))
    for name, path in places:
        if path is not None and path.exists() and _others_may_read(path):
            text = f"others than its owner can read the {name}: whoever runs Flower must not. Run: chmod -R go= {path}"
            found.append(Diagnosis(question=f"{name} is private", state="warning", answer=text))
    if not os.access(policy.socket.parent, os.W_OK):
        found.append(Diagnosis(question="socket", state="error", answer=f"the folder of {policy.socket.name} does not exist or is closed"))
    if policy.reply_grid_seconds == 0:
        text = "answers leave at once, so their time tells about the number of patients; set reply_grid_seconds"
        found.append(Diagnosis(question="time of answers", state="warning", answer=text))
    return found


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
