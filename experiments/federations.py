"""Sites of a federation as experiments make them: a folder each, with policy and ledger; their guards answer in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsynth.progress import silent
from dpsynth.signing import generate_key, load_private
from federated.coordinator import Coordinator
from federated.federation import Federation, load_federation
from federated.policy import load_policy, open_site_ledger
from federated.simulate import InProcess, coordinator_of
from federated.site import Guard

DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sites by name, each with the data settings of its policy; `settings` are those of the study, without its name and sites."""

    folder: Path
    sites: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    channels: tuple[int, ...]
    epsilon: float

    def write(self) -> Federation:
        """Keys, policies, ledgers and the study. What is there already stays."""
        keys = self.folder / "coordinator"
        if not (keys / "signing.pub").is_file():
            generate_key(keys)
        for name, data in self.sites.items():
            self._write_site(name, data, keys / "signing.pub")
        path = self.folder / "study.yaml"
        path.write_text(json.dumps({"study": "study", "sites": list(self.sites), "quorum": len(self.sites), **self.settings}))
        return load_federation(path)  # JSON is YAML

    def _write_site(self, name: str, data: Mapping[str, Any], public: Path) -> None:
        path = self.policy(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"ledger": "ledger.jsonl", "state": "state", "socket": "guard.sock", "coordinators": [str(public)]}
        budget = {"epsilon": self.epsilon, "delta": DELTA, "study_epsilon": self.epsilon}
        limits = {"models": [list(self.channels)], "largest_low_frequencies": 32, "reply_grid_seconds": 0}
        path.write_text(json.dumps({"site": name, "data": {"name": name, **data}, **own, **budget, **limits}))
        path.chmod(0o600)
        policy = load_policy(path)
        if not policy.ledger.exists():
            open_site_ledger(policy, max_gate_attempts=1, progress=silent)

    def policy(self, name: str) -> Path:
        """The policy file of a site."""
        return self.folder / name / "policy.yaml"

    def guard(self, name: str) -> Guard:
        """The guard of a site, in this process."""
        return Guard.open(load_policy(self.policy(name)))

    def simulated(self) -> Coordinator:
        """The coordinator, with all guards in this process."""
        federation = self.write()
        guards = InProcess({name: self.guard(name).handle for name in self.sites})
        private = load_private(self.folder / "coordinator" / "signing.key")
        return coordinator_of(federation, private=private, transport=guards, folder=self.folder / "work")
