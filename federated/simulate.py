"""N sites in one process: the same guards, the same messages and the same coordinator as between hospitals, without anything between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpsynth.artifacts import read_json, write_json
from dpsynth.errors import ArtifactError
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.progress import Progress, silent
from federated.coordinator import Coordinator, Event, Transport, quiet
from federated.federation import Federation, plan_of
from federated.outcome import claim_of, write_outcome
from federated.public_stage import PRETRAINED, public_weights
from federated.rounds import Model
from federated.study_folder import OUTCOME


@dataclass(frozen=True)
class InProcess:
    """Hands each frame to its site's guard, one after the other. handlers: by site, from frame to frame."""

    handlers: Mapping[str, Callable[[bytes], bytes]]

    def __call__(self, requests: Mapping[str, bytes], *, deadline_seconds: float) -> dict[str, bytes]:
        """Replies by site."""
        del deadline_seconds  # nothing is waited for
        return {site: self.handlers[site](frame) for site, frame in requests.items()}


def coordinator_of(
    federation: Federation,
    *,
    private: Ed25519PrivateKey,
    transport: Transport,
    folder: Path,
    report: Callable[[Event], None] = quiet,
) -> Coordinator:
    """The coordinator of a federation."""
    config = federation.config
    public = config.pretrain.model_copy(update={"source": "phantom", "path": None})  # as the sites have it; the net may learn from others
    plan, model = plan_of(federation), Model.of(config.model_copy(update={"pretrain": public}))
    return Coordinator(federation=federation, plan=plan, model=model, private=private, transport=transport, folder=folder, report=report)


def run_study(
    coordinator: Coordinator, *, run_path: Path, progress: Progress = silent, ready: Callable[[], None] = lambda: None
) -> Guarantee:
    """Ask all rounds that are missing and write the run folder; a finished one is read. What can be wrong is found before what takes long.

    ready: called before anybody is asked, to raise what stands in the way. Raises QuorumLost, ClaimRefused and others.
    """
    coordinator.require_same()
    _require_its_run(coordinator.folder / OUTCOME, run_path)
    guarantee = claim_of(coordinator, run_path)
    if guarantee is None:
        if not coordinator.asks_no_more:
            ready()
        state = coordinator.run(
            lambda: public_weights(coordinator.federation.config, kept=coordinator.folder / PRETRAINED, progress=progress)
        )
        guarantee = write_outcome(coordinator, state, run_path=run_path)
    write_json(coordinator.folder / OUTCOME, {"run": str(run_path.resolve())})
    return guarantee


def _require_its_run(outcome: Path, run_path: Path) -> None:
    """Raise ArtifactError when the study is finished in another folder, of which candidates may be out already."""
    known = Path(read_json(outcome)["run"]) if outcome.is_file() else run_path.resolve()
    if known != run_path.resolve() and (known / "run.json").is_file():
        raise ArtifactError(f"This study is finished in {known}. Name that as --run.")
