"""What a hospital should know before its guard listens: each finding is ok, a warning, or a reason not to start."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dpsynth.errors import DpsynthError
from dpsynth.plan import fewest_control
from dpsynth.policy_needs import missing
from dpsynth.progress import Progress
from dpsynth.signing import key_id, load_public
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
    found = [Diagnosis(question="policy", state="ok", answer=f"site {policy.site}"), *map(_coordinator, policy.coordinators)]
    found += _files(policy_path, policy)
    if lacking := missing(policy.gate):
        found.append(Diagnosis(question="gate", state="error", answer=f"no candidates could be checked: {lacking}"))
    if any(item.question == "coordinator" and item.state == "error" for item in found):
        return found  # no guard can be made
    try:
        guard = Guard.open(policy, progress=progress)
        spent = guard.ledger.spent()
        found.append(
            Diagnosis(question="ledger", state="ok", answer=f"sound; {spent:.3f} of {policy.epsilon:g} spent at delta {policy.delta:g}")
        )
        found += [Diagnosis(question="patients", state="warning", answer=text) for text in _too_few(policy)]
        guard.images  # noqa: B018 (reads the data set and compares it with the ledger)
        found.append(Diagnosis(question="data", state="ok", answer="the data set of the ledger, and delta is small enough for it"))
    except (DpsynthError, OSError) as error:
        found.append(Diagnosis(question="ledger and data", state="error", answer=str(error)))
    return found


def _too_few(policy: SitePolicy) -> list[str]:
    fewest, control = fewest_control(policy.gate), policy.data.declared_patients * policy.data.control_fraction
    if control >= fewest:
        return []
    share = math.ceil(100 * fewest / policy.data.declared_patients) / 100
    mend = f"Raise data.control_fraction to {share:g}" if share <= 0.5 else f"Bring {2 * fewest} patients with data.control_fraction 0.5"
    return [
        f"about {control:.0f} control patients; below {fewest} the checks cannot tell, so that no candidates could be approved here and a "
        f"study would be paid for nothing. {mend}, or take part in no study"
    ]


def _coordinator(path: Path) -> Diagnosis:
    try:
        text = f"{path.name}, key {key_id(load_public(path))[:16]}; compare it with the coordinator by telephone"
        return Diagnosis(question="coordinator", state="ok", answer=text)
    except DpsynthError as error:
        return Diagnosis(question="coordinator", state="error", answer=str(error))


def _files(policy_path: Path, policy: SitePolicy) -> list[Diagnosis]:
    found = []
    if own_file(policy_path):
        text = "the guard's user can write its own policy; give it to another user: chown root and chmod 644"
        found.append(Diagnosis(question="owner of the policy", state="warning", answer=text))
    places: tuple[tuple[str, Path | None], ...] = (("data", policy.data.path), ("ledger", policy.ledger), ("state", policy.state))
    for name, path in places:
        if path is not None and path.exists():
            found += _open_to_others(name, path)
    folder = policy.socket.parent
    if not folder.is_dir():
        text = f"the folder {folder} is not there now; a unit's RuntimeDirectory makes it at the start, otherwise make it"
        found.append(Diagnosis(question="socket", state="warning", answer=text))
    elif not os.access(folder, os.W_OK):
        found.append(Diagnosis(question="socket", state="error", answer=f"this user cannot write in {folder}"))
    if policy.reply_grid_seconds == 0:
        text = "answers leave at once, so their time tells about the number of patients; set reply_grid_seconds"
        found.append(Diagnosis(question="time of answers", state="warning", answer=text))
    return found


def _open_to_others(name: str, path: Path) -> list[Diagnosis]:
    """Whether others than its owner can write it, which no guard should live with, or read it."""
    mode, question, mend = path.stat().st_mode, f"{name} is private", f"whoever runs Flower must not. Run: chmod -R go= {path}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return [Diagnosis(question=question, state="error", answer=f"others than its owner can change the {name}: {mend}")]
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return [Diagnosis(question=question, state="warning", answer=f"others than its owner can read the {name}: {mend}")]
    return []
