"""Two hospitals that trained together, checked the candidates and approved them: all in one folder that can be copied and spoilt."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cases import verdict
from federation_cases import CONFIG, POLICY

from dpsynth.checks.accounting import accounting
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.mechanism import mechanism
from dpsynth.checks.verdict import Verdict
from dpsynth.config import GateConfig
from dpsynth.generate import generate
from dpsynth.progress import silent
from dpsynth.release.federated import release_federated
from dpsynth.release.statement import SiteStatement
from dpsynth.signing import generate_key, load_private
from federated import site_checks
from federated.candidates import pack
from federated.federation import load_federation
from federated.policy import SitePolicy, load_policy, open_site_ledger
from federated.simulate import InProcess, coordinator_of, run_study
from federated.site import Guard
from federated.site_approval import approve

SITES = ("north", "south")
GATE = "gate: {required: [accounting, mechanism, membership, copying, content], largest_membership_auc: 0.9}"
ATTRIBUTES = "attributes: {sex: {values: [F, M]}}"
STUDY = "study: joint\nsites: [north, south]\nquorum: 2\nrounds: 2\nsteps_per_round: 2\nsite_keys: {north: north/keys/signing.pub, south: south/keys/signing.pub}\n"  # noqa: E501


@dataclass(frozen=True)
class Joint:
    """Folders of the coordinator and of each site below one."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def candidates(self) -> Path:
        return self.folder / "candidates.zip"

    @property
    def coordinator_key(self) -> Path:
        return self.folder / "keys" / "signing.key"

    def policy(self, site: str) -> SitePolicy:
        return load_policy(self.folder / site / "policy.yaml")

    def guard(self, site: str) -> Guard:
        return Guard.open(self.policy(site))

    def key(self, site: str) -> Path:
        return self.folder / site / "keys" / "signing.key"

    def statement(self, site: str) -> Path:
        return self.folder / f"{site}.dsse.json"

    def approve(self, site: str, out: str) -> SiteStatement:
        return approve(self.guard(site), self.candidates, key_path=self.key(site), out=self.folder / out, reviews={})

    def release(self, *, approvals: Sequence[Path] | None = None, out: str = "out") -> Path:
        return release_federated(
            self.run,
            out=self.folder / out,
            key_path=self.coordinator_key,
            approvals=approvals if approvals is not None else [self.statement(site) for site in SITES],
            site_keys=load_federation(self.folder / "study.yaml").public_keys(),
            progress=silent,
        )


def build(folder: Path) -> Joint:
    """From nothing to approvals, in one process."""
    joint = Joint(folder)
    generate_key(folder / "keys")
    for seed, site in enumerate(SITES):
        generate_key(folder / site / "keys")
        text = POLICY.replace("NAME", site).replace("SEED", str(seed)).replace("coordinator/signing.pub", "../keys/signing.pub")
        path = folder / site / "policy.yaml"
        text = text.replace("num_patients: 120", "num_patients: 240").replace("name:", f"control_fraction: 0.3, {ATTRIBUTES}, name:")
        path.write_text(text + GATE)
        path.chmod(0o600)
        open_site_ledger(joint.policy(site), max_gate_attempts=2, progress=silent)
    config = CONFIG.replace("data: {", f"data: {{{ATTRIBUTES}, ")
    indented = "".join(f"  {line}\n" for line in f"{config}generate: {{count: 60}}\n{GATE}".splitlines())
    (folder / "study.yaml").write_text(f"{STUDY}config:\n{indented}")
    federation = load_federation(folder / "study.yaml")
    transport = InProcess({site: joint.guard(site).handle for site in SITES})
    private = load_private(joint.coordinator_key)
    run_study(coordinator_of(federation, private=private, transport=transport, folder=folder / "studies" / "joint"), run_path=joint.run)
    generate(joint.run, progress=silent)
    pack(joint.run, out=joint.candidates, private=private)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_checks, "run_checks", played)
        for site in SITES:
            site_checks.check_candidates(joint.guard(site), joint.candidates, progress=silent)
            joint.approve(site, joint.statement(site).name)
    return joint


def played(evidence: Evidence, gate: GateConfig, **_: object) -> tuple[Verdict, ...]:
    """Checks in a second: those of the engine as they are; of those that compare images, the word of a site that found nothing."""
    return (accounting(evidence), mechanism(evidence, gate), *(verdict(name) for name in ("membership", "copying", "content")))


@pytest.fixture(scope="session")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Joint:
    """To read only."""
    return _built(tmp_path_factory.getbasetemp())


@cache
def _built(base: Path) -> Joint:
    """Once a session, whichever folders of tests import the fixture."""
    return build(base / "joint")


@pytest.fixture
def joint(approved: Joint, tmp_path: Path) -> Joint:
    """A copy to spoil."""
    shutil.copytree(approved.folder, tmp_path / "joint")
    return Joint(tmp_path / "joint")
