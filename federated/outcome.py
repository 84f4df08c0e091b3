"""What a study ends with: a run folder that `dpsynth generate` draws from, and what it cost each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsynth.artifacts import RunFolder, write_json
from dpsynth.config import dump_config
from dpsynth.errors import ArtifactError
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import QUERIES, count_stddev
from dpsynth.privacy.accountant import account, epsilon_pld
from dpsynth.privacy.guarantee import Guarantee, claim
from dpsynth.privacy.mechanism import Mechanism, PoissonDpSgd, merged, to_json
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.progress import silent
from dpsynth.release.federated import load_federated_run
from dpsynth.release.federated_gate import data_name_of, unprotected
from dpsynth.train.second_opinion import prv_epsilon
from dpsynth.trained import CLAIM, FEDERATION, read_claim
from federated.coordinator import EMA, Coordinator, State
from federated.messages import FIRST_TRAINING
from federated.public_stage import PRETRAINED, public_enlargers
from federated.rounds import load_weights, sgd_of


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Epsilon of a study at one delta: by site, for a patient who is at one site (disjoint), and for one who is at all (overlapping)."""

    delta: float
    by_site: Mapping[str, float]
    disjoint: float
    overlapping: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"delta": self.delta, "by_site": dict(self.by_site), "disjoint": self.disjoint, "overlapping": self.overlapping}


def charged(coordinator: Coordinator) -> dict[str, tuple[Mechanism, ...]]:
    """What each site may have released, by the coordinator's own count: every round that it was asked for and did not refuse."""
    plan, federation, known = coordinator.plan, coordinator.federation, coordinator.facts
    moments = coordinator.model.release(plan)
    found: dict[str, tuple[Mechanism, ...]] = {}
    for site, rounds in coordinator.asked.items():
        asked = [moments.alone(query) for number, query in enumerate(QUERIES) if number in rounds]
        steps = sum(number >= FIRST_TRAINING for number in rounds) * plan.steps_per_round
        declared = federation.config.data.declared_patients if site not in known else known[site].declared_patients
        found[site] = merged([*asked, *([sgd_of(plan, steps=steps, declared_patients=declared)] if steps else [])])
    return found


def spending(coordinator: Coordinator) -> Spending:
    """Per site, the largest of all, and the composition of all."""
    delta, by_site = coordinator.federation.delta, charged(coordinator)
    alone = {site: epsilon_pld(mechanisms, delta) for site, mechanisms in by_site.items()}
    # Sites declare different numbers of patients, which changes no loss: as one, their steps add up exactly.
    together = [replace(m, declared_patients=1) if isinstance(m, PoissonDpSgd) else m for ms in by_site.values() for m in ms]
    return Spending(delta=delta, by_site=alone, disjoint=max(alone.values(), default=0.0), overlapping=epsilon_pld(together, delta))


def write_outcome(coordinator: Coordinator, state: State, *, run_path: Path) -> Guarantee:
    """Write the run folder. Raises ClaimRefused when the accountants do not agree, ArtifactError when the folder is in use."""
    if claim_of(coordinator, run_path) is not None:
        raise ArtifactError(f"{run_path} holds this study already.")
    federation, spent = coordinator.federation, spending(coordinator)
    by_site = charged(coordinator)
    worst = max(by_site, key=lambda site: spent.by_site[site])
    run = _begun(run_path, config_text=dump_config(federation.config))
    _generator(coordinator, state).save(run.folder("train"))
    guarantee = _claim(coordinator, by_site[worst], spent)
    sites = [
        {
            "site": site,
            "epsilon": spent.by_site[site],
            "rounds": sorted(coordinator.asked[site]),
            "answered": coordinator.answered.get(site, []),
            "mechanisms": [to_json(mechanism) for mechanism in by_site[site]],
            "states": coordinator.facts[site].model_dump(mode="json") if site in coordinator.facts else None,
        }
        for site in by_site
    ]
    facts = {
        "study": federation.study,
        "plan": coordinator.plan.model_dump(mode="json"),
        "rounds": state.round + 1 - FIRST_TRAINING,
        "spending": spent.to_json(),
        "sites": sites,
    }
    write_json(run.folder("train") / FEDERATION, facts)
    write_json(run.folder("train") / CLAIM, guarantee.to_json())
    run.complete("train", facts={"study": federation.study})
    return guarantee


def claim_of(coordinator: Coordinator, path: Path) -> Guarantee | None:
    """What the run folder of this study claims; None when it is still to be made, or was half written by a process that died: what it holds
    is computed again from the last checkpoint. Raises ArtifactError for a folder that holds anything else.
    """
    if not (path / "run.json").is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"Expected {path} not to exist or to be empty. Name another --run.")
        return None
    run, other = RunFolder.open(path), f"{path} holds another run, or this study with other settings. Name another --run."
    local = (path / "train" / "site").exists()  # a run of `dpsynth train`, which has secrets of its own
    if run.config_text != dump_config(coordinator.federation.config) or local:
        raise ArtifactError(other)
    if not run.is_complete("train"):
        return None
    found = load_federated_run(run)
    if (found.study, found.plan_sha256) != (coordinator.federation.study, coordinator.plan.digest):
        raise ArtifactError(other)
    return read_claim(run)


def _begun(path: Path, *, config_text: str) -> RunFolder:
    """The run folder, new or made anew, of which `claim_of` said that nobody loses anything."""
    if (path / "run.json").is_file():
        run = RunFolder.open(path)
        run.reset("train")
        return run
    return RunFolder.create(path, config_text=config_text)


def _generator(coordinator: Coordinator, state: State) -> Generator:
    model = coordinator.model
    moments = model.moments(state.arrays)
    denoiser = model.denoiser()
    load_weights(denoiser, state.arrays)
    load_weights(denoiser, {name.removeprefix(EMA): array for name, array in state.arrays.items() if name.startswith(EMA)})
    denoiser.transplant(moments)
    release = model.release(coordinator.plan)
    answered = sum(0 in rounds for rounds in coordinator.answered.values())
    stddev = count_stddev(release, model.reference) * answered**0.5
    generator = Generator.of(coordinator.federation.config, moments=moments, denoiser=denoiser, count_stddev=stddev)
    generator = generator.with_released_detail(coordinator.federation.config.generate, progress=silent)
    enlargers = public_enlargers(coordinator.federation.config, kept=coordinator.folder / PRETRAINED)
    return replace(generator, enlargers=enlargers)


def _claim(coordinator: Coordinator, mechanisms: tuple[Mechanism, ...], spent: Spending) -> Guarantee:
    """The claim for a patient of the site that spent most; the bound for patients of several sites stands among the unprotected."""
    federation, facts = coordinator.federation, list(coordinator.facts.values())
    data = federation.config.data
    ledgers = [float(fact.ledger_epsilon) for fact in facts]
    guarantee = Guarantee(
        data_name=data_name_of(federation.study),
        unit=PrivacyUnit.IMAGE if any(fact.unit == "image" for fact in facts) else PrivacyUnit.PATIENT,
        declared_patients=data.declared_patients,
        mechanisms=mechanisms,
        accounting=account(mechanisms, spent.delta, second_opinion=prv_epsilon),
        ledger_epsilon=max([*ledgers, spent.disjoint]),
        max_images_per_patient=max(fact.max_images_per_patient for fact in facts),
        unprotected=unprotected(
            sites=sorted(spent.by_site), overlapping=spent.overlapping, classes=data.classes, spatial_shape=data.spatial_shape
        ),
    )
    return claim(guarantee)
