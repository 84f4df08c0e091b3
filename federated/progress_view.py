"""What a coordinator's folder says of a study: rounds done, and for each site what it may have spent and its last answer. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpsynth.artifacts import read_json
from dpsynth.errors import ArtifactError
from federated.lines import read_lines


def progress_of(folder: Path) -> dict[str, Any]:
    """Plain values. Raises ArtifactError when no study began there."""
    if not (folder / "study.json").is_file():
        raise ArtifactError(f"Expected a study at {folder}, found none. `dpsynth-federation run` begins one.")
    study, events = read_json(folder / "study.json"), read_lines(folder / "events.jsonl")
    known = read_json(folder / "sites.json") if (folder / "sites.json").is_file() else {"asked": {}, "facts": {}}
    rounds = sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors"))
    last = {event["site"]: event for event in events}
    sites = {
        site: {
            "outcome": event["outcome"],
            "round": event["round"],
            "reason": event["reason"],
            "rounds_that_may_be_released": known["asked"].get(site, []),
            "ledger_epsilon": known["facts"].get(site, {}).get("ledger_epsilon"),
        }
        for site, event in last.items()
    }
    return {"study": study["study"], "rounds_done": rounds[-1] if rounds else None, "sites": sites}


def describe(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    done = "no round is done" if found["rounds_done"] is None else f"round {found['rounds_done']} is done"
    lines = [f"{found['study']}: {done}"]
    for site, values in found["sites"].items():
        spent = "?" if values["ledger_epsilon"] is None else f"{float(values['ledger_epsilon']):.2f}"
        answer = f"{values['outcome']} in round {values['round']} {values['reason']}".rstrip()
        lines.append(f"{site:<12} its ledger says epsilon {spent} over all runs; {answer}")
    return lines
