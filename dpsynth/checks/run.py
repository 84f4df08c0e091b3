"""The verb check: candidates against training and control patients. Each call is booked as a gate attempt before it begins."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpsynth.artifacts import RunFolder, read_json, sha256_file, write_bytes, write_json
from dpsynth.checks.encoders import encoder_of
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.family import needed
from dpsynth.checks.kept import UnfinishedCheck
from dpsynth.checks.noted import looked_at
from dpsynth.checks.review import Answering, review_page
from dpsynth.checks.screening import screen_candidates
from dpsynth.checks.suite import run_checks
from dpsynth.checks.verdict import CONTENT, REVIEW, VERDICTS, Verdict
from dpsynth.config import Config, GenerateConfig, parse_config
from dpsynth.data.attributes import by_cell, conditions_digest
from dpsynth.data.candidates import Candidates, load_candidates, to_8_bit, to_unit_range, withheld
from dpsynth.data.fingerprint import require_data
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import Split, restore_split
from dpsynth.errors import ArtifactError, LedgerError
from dpsynth.model.generator import Generator
from dpsynth.privacy.audit import CANARIES
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.progress import Progress, say_nothing
from dpsynth.trained import Trained, load_trained

_UNFINISHED = "unfinished_check"  # in the run's folder, while a check is going on
_DRAWN_AGAIN = 100  # images of the candidates
_LARGEST_DIFFERENCE = 1.0  # of 255, on average over an image: another machine rounds otherwise
SEED = 0  # of the tests' own draws; fixed, so that asking again cannot be a second try


def check(
    run_path: Path, *, ledger_path: Path | None, progress: Progress, note: Callable[[str], object] = say_nothing
) -> tuple[Verdict, ...]:
    """Run all checks of a run, write their verdicts and the page for a person. Raises BudgetExceeded when the generator was checked too
    often.

    One that was killed goes on under the attempt that it had booked, as long as the candidates are the same. `note` is told which attempt
    it is, and whether it goes on.
    """
    run = RunFolder.open(run_path)
    run.require("generate")
    config = parse_config(run.config_text, base=run.path)
    encoder_of(config.gate.encoder)  # what it lacks is said before the attempt is booked
    trained = load_trained(run, config.data, ledger_path=ledger_path)
    split = _split(run, config, trained, progress)
    unfinished = UnfinishedCheck(run.path / _UNFINISHED)
    candidates, generator = load_candidates(run), Generator.load(run.folder("train"))
    require_drawn(candidates, generator, config.generate, progress=progress)
    with unfinished.alone():
        # Patients and coins are those of the run's booking by now.
        attempt = unfinished.booked(trained.ledger, trained.charge.run_id, {"candidates_sha256": candidates.sha256}, note=note)
        synthetic = to_unit_range(candidates.images)
        screening = screen_candidates(
            candidates, generator.cells, generator.moments, config.gate.content, sample_key=split.key, progress=progress
        )
        site = run.folder("train") / "site"
        evidence = Evidence(
            synthetic=synthetic,
            synthetic_labels=candidates.labels,
            training=split.training,
            control=split.control,
            in_pool=split.in_pool,
            epsilon=trained.guarantee.epsilon,
            delta=trained.guarantee.delta,
            selfcheck=read_json(site / "selfcheck.json"),
            canaries=read_json(site / CANARIES),
            accounting_problems=trained.guarantee.problems(),
            ledger_problems=tuple(trained.ledger.verify()),
            uses_sgd=any(isinstance(mechanism, PoissonDpSgd) for mechanism in trained.guarantee.mechanisms),
            synthetic_attributes=candidates.attributes,
            screening=screening,
            generator=generator,
            withheld=withheld(run),
        )
        verdicts = run_checks(evidence, config.gate, seed=SEED, progress=progress, keep=unfinished)
        if load_candidates(run).sha256 != candidates.sha256:
            raise ArtifactError("The candidates were changed while they were checked. Restore them and run `dpsynth check` again.")
        run.reset("check")
        facts = {"attempt": attempt, "candidates_sha256": candidates.sha256}
        record = run.folder("check") / VERDICTS
        write_json(run.folder("check") / CONTENT, screening.log(candidates.seeds), private=True)
        required, answering = needed(config.gate.required), _answering(run_path, ledger_path)
        page = review_page(evidence, verdicts, required=required, answering=answering, images_sha256=candidates.sha256)
        write_bytes(run.folder("check") / REVIEW, page.encode(), private=True)
        noted = {**facts, "files": looked_at(run), "verdicts": [verdict.to_json() for verdict in verdicts]}
        write_json(record, noted, private=True)
        trained.ledger.record_verdicts(trained.charge.run_id, sha256_file(record))
        run.complete("check", needs=("train", "generate"), facts=facts)
        unfinished.forget()
        return verdicts


def _answering(run_path: Path, ledger_path: Path | None) -> Answering:
    ledger = "" if ledger_path is None else f" --ledger {shlex.quote(str(ledger_path))}"
    words = "Your name and words go into the release, for everybody to read: name no patient, and no image that resembles one."
    run = shlex.quote(str(run_path))
    return Answering(
        command=f"dpsynth release {run} OUT --key KEY{ledger}", words=words, refusing=f"dpsynth refuse {run} --because 'NAME: WHY'{ledger}"
    )


def require_drawn(candidates: Candidates, generator: Generator, settings: GenerateConfig, *, progress: Progress) -> None:
    """Raise ArtifactError unless images of a random sample are those that the generator draws from their seeds. No patient is looked at.

    Whoever puts other images in their place would have judged, and released, what has no guarantee. The sample is of no fixed seed.
    """
    rng = np.random.default_rng()
    rows = rng.permutation(len(candidates.images))[:_DRAWN_AGAIN]
    chosen = candidates.kept(np.isin(np.arange(len(candidates.images)), rows))
    cells = generator.cells.index(chosen.labels, chosen.conditions())
    again = to_8_bit(generator.sample(cells, chosen.seeds, settings, progress=progress)).astype(np.int16)
    apart = np.abs(again - chosen.images).reshape(len(again), -1).mean(axis=1)
    if (apart > _LARGEST_DIFFERENCE).any():
        raise ArtifactError(
            f"{int((apart > _LARGEST_DIFFERENCE).sum())} of {len(again)} candidates are not what the generator draws from their seeds. "
            "Remove the run's folder generate and draw again here: `dpsynth generate`."
        )


def _split(run: RunFolder, config: Config, trained: Trained, progress: Progress) -> Split:
    """The patients as they were trained on: the same images, by the ledger's fingerprint, the same attributes, and the same sides."""
    cohort, ledger = read_cohort(config.data), trained.ledger
    require_data(cohort, config.data, ledger, progress=progress)
    ledger.require_unchanged(trained.charge.run_id)
    images = prepare(cohort, config.data, progress=progress)
    if conditions_digest(by_cell(images, config.data), config.data, salt=ledger.digest_salt) != trained.conditions:
        raise LedgerError("The attributes of the patients are not those that the ledger noted before training. Restore the table.")
    split = restore_split(images, read_json(run.folder("train") / "site" / "split.json"))
    if split.commitment != trained.charge.coins_sha256:
        raise ArtifactError("The patients' coins are not those that the ledger noted before training. Restore train/site/split.json.")
    return split
