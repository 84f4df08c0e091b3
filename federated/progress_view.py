"""What a coordinator's folder says of a study: rounds, who is waited for, and each site's last answers and spending. Torch-free."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from dpsynth.artifacts import RunFolder, read_json
from dpsynth.errors import ArtifactError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.mechanism import from_json
from federated.messages import FIRST_TRAINING
from federated.study_folder import EVENTS, KNOWN, OUTCOME, QUESTION, STUDY_FILE, read_lines


def progress_of(folder: Path) -> dict[str, Any]:
    """Plain values. Raises ArtifactError when no study began there."""
    if not (folder / STUDY_FILE).is_file():
        others = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{STUDY_FILE}"))) or "no study"
        raise ArtifactError(f"Expected a study at {folder}, found {others} in {folder.parent}. `dpsynth-federation run` begins one.")
    study, events = read_json(folder / STUDY_FILE), read_lines(folder / EVENTS)
    known = _read(folder / KNOWN) or {"asked": {}, "facts": {}}
    outcome = _read(folder / OUTCOME)
    rounds = sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors"))
    return {
        "study": study["study"],
        "finished": outcome is not None,
        "run": None if outcome is None else outcome["run"],
        "next": None if outcome is None else next_step(Path(outcome["run"]), folder.parent.parent),
        "rounds_done": rounds[-1] if rounds else None,
        "last_round": FIRST_TRAINING + study["plan"]["rounds"] - 1,
        "waits_for": _read(folder / QUESTION),
        "sites": {site: _site(site, events, known) for site in study["plan"]["sites"]},
    }


def next_step(run: Path, folder: Path) -> str:
    """What a coordinator does with the run of a finished study, for the coordinator's folder."""
    drawn = run.is_dir() and RunFolder.open(run).is_complete("generate")
    return f"dpsynth-federation candidates {run} --folder {folder} --out FILE" if drawn else f"dpsynth generate {run}"


def describe(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    done = "no round is done" if found["rounds_done"] is None else f"round {found['rounds_done']} is done"
    lines = [f"{found['study']}: {done}; the last is {found['last_round']}"]
    if found["finished"]:
        lines.append(f"finished: {found['run']}. Next: {found['next']}")
    elif (waits := found["waits_for"]) is not None:
        late = datetime.now(UTC) > datetime.fromisoformat(waits["until"])
        lines.append(
            f"{_question(waits)}: {', '.join(waits['sites'])} asked at {waits['since']}; answers are waited for until {waits['until']}"
            + (", which is over: should `run` have ended, the same command goes on" if late else "")
        )
    else:
        lines.append("nobody is asked at present: `run` pauses before it asks again, or has ended; then the same command goes on")
    for site, values in found["sites"].items():
        lines.append(f"{site:<12} {_answer(values['last'])}; epsilon {_figure(values)}")
        if values["last_refusal"] not in (None, values["last"]):
            lines.append(f"{'':<12} before: {_answer(values['last_refusal'])}")
    return lines


def _site(name: str, events: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """Epsilons are those of the site's ledger, as its last answer stated them: of this study, and of all runs on its data."""
    own, facts = [event for event in events if event["site"] == name], known["facts"].get(name)
    return {
        "last": own[-1] if own else None,
        "last_refusal": next((event for event in reversed(own) if event["outcome"] != "ok"), None),
        "rounds_that_may_be_released": known["asked"].get(name, []),
        "study_epsilon": None if facts is None else _epsilon(json.dumps(facts["charged"]), facts["delta"]),
        "ledger_epsilon": None if facts is None else facts["ledger_epsilon"],
    }


@cache
def _epsilon(charged: str, delta: float) -> float:
    return epsilon_pld([from_json(mechanism) for mechanism in json.loads(charged)], delta)


def _answer(event: dict[str, Any] | None) -> str:
    if event is None:
        return "no answer yet"
    return f"{event['outcome']} in {_question(event)} at {event['time']} {event['reason']}".rstrip()


def _question(said: dict[str, Any]) -> str:
    return "joining" if said["round"] is None else f"round {said['round']}"


def _figure(values: dict[str, Any]) -> str:
    if values["ledger_epsilon"] is None:
        return "not known yet"
    return f"{values['study_epsilon']:.2f} of this study, {float(values['ledger_epsilon']):.2f} of all runs, by its ledger"


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None
