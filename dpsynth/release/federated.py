"""From a federated run and its sites' statements to a released folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dpsynth.artifacts import STAGES, RunFolder, read_json
from dpsynth.checks.family import needed
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import Candidates, load_candidates, load_cell_rows
from dpsynth.data.images_digest import images_digest
from dpsynth.errors import ArtifactError, GateRefused
from dpsynth.progress import Progress
from dpsynth.release.bundle import Release, write_release
from dpsynth.release.decision import detector_of, no_detector_of
from dpsynth.release.federated_gate import FederatedRun, SitesQuestion, claimed_with, decide_sites, federated_run
from dpsynth.release.gate import Refused
from dpsynth.release.sites import FederatedSites, read_statements
from dpsynth.report.epsilon import epsilon_report
from dpsynth.report.html import render
from dpsynth.signing import load_private
from dpsynth.trained import FEDERATION, is_federated, read_claim


def load_federated_run(run: RunFolder) -> FederatedRun:
    """What the coordinator counted. Raises ArtifactError for a run of one site."""
    if not is_federated(run.path):
        raise ArtifactError(f"This run was not trained by several hospitals, so it goes on with `dpsynth`. Next: {_next_step(run)}")
    run.require("train")
    return federated_run(read_json(run.folder("train") / FEDERATION))


def _next_step(run: RunFolder) -> str:
    """Of a run of one site."""
    missing = next((verb for verb in STAGES[1:] if not run.is_complete(verb)), None)
    return f"dpsynth {missing} {run.path}" if missing else f"dpsynth release {run.path} OUT --key FILE"


def required_checks(config: Config) -> tuple[str, ...]:
    """The checks that every site must require before it approves candidates of this study."""
    return needed(config.gate.required)


def release_federated(
    run_path: Path, *, out: Path, key_path: Path, approvals: Sequence[Path], site_keys: Mapping[str, Ed25519PublicKey], progress: Progress
) -> Path:
    """Ask the gate and write the signed folder. site_keys: by site the key that must have signed. Raises GateRefused with every reason."""
    private = load_private(key_path)
    run = RunFolder.open(run_path)
    counted, config, candidates = load_federated_run(run), parse_config(run.config_text, base=run.path), load_candidates(run)
    sites = FederatedSites(run=counted, signed=read_statements(approvals, site_keys))
    guarantee = claimed_with(read_claim(run), counted, sites.statements)
    question = SitesQuestion(
        run=counted,
        guarantee=guarantee,
        required=required_checks(config),
        statements=sites.statements,
        images_sha256=images_digest(candidates),
    )
    answer = decide_sites(question, configured_epsilon=config.privacy.epsilon)
    if isinstance(answer, Refused):
        raise GateRefused("The gate refuses the release: " + "; ".join(answer.reasons) + ".")
    heads = ":".join(f"{name}:{found.ledger_sha256}" for name, found in sorted(sites.statements.items()))
    package = Release(
        allowed=answer,
        release_id=hashlib.sha256(f"{question.images_sha256}:{heads}".encode()).hexdigest()[:16],
        candidates=candidates,
        candidates_sha256=question.images_sha256,
        classes=config.data.classes,
        guarantee=guarantee,
        verdicts=(),
        required=question.required,
        reviews={},
        method=config.method,
        report_html=_page(run, config, candidates, question, sites),
        ledger_head=None,
        settings=config.release,
        sites=sites,
        detector=detector_of(run),
        no_detector=no_detector_of(run, config),
    )
    return write_release(package, out=out, private=private, progress=progress)


def _page(run: RunFolder, config: Config, candidates: Candidates, question: SitesQuestion, sites: FederatedSites) -> str:
    view = epsilon_report(
        guarantee=question.guarantee,
        verdicts=(),
        required=question.required,
        decision={"allowed": True, "reasons": []},
        budget=None,
        method=config.method,
        title=config.release.title,
        count=len(candidates.images),
        site=False,
        cells=[asdict(row) for row in load_cell_rows(run)],
        federation=sites.view(),
        provenance={"images (SHA-256)": question.images_sha256, "study": question.run.study, "plan (SHA-256)": question.run.plan_sha256},
    )
    return render(view, images=candidates.images, labels=candidates.labels, classes=config.data.classes)
