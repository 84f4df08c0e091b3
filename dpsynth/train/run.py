"""The verb train: public stage, reservation, moments, DP-SGD, claim. Nothing computed on private images is written before it is booked.

A run that was killed at any point goes on with the same command: the ledger keeps the full charge, and because every random draw is a
function of the run's secret key and the step, the repeated steps release nothing new.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dpsynth import policy_needs
from dpsynth.artifacts import RunFolder, write_bytes, write_json
from dpsynth.config import Config, dump_config, resolved
from dpsynth.data.attributes import by_cell, conditions_digest
from dpsynth.data.cohort import Float32, ImageSet
from dpsynth.data.fingerprint import require_data
from dpsynth.data.halve import halved, halved_set
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import Split, split_patients
from dpsynth.errors import ArtifactError, BudgetExceeded, ClaimRefused, ConfigError, DataError, LedgerError
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import count_stddev, moment_queries, release_moments
from dpsynth.model.moments import Moments, PublicReference, public_reference
from dpsynth.model.votes import num_candidates, release_votes
from dpsynth.plan import VOTES, planned_mechanisms
from dpsynth.privacy.accountant import FINE, account, epsilon_pld
from dpsynth.privacy.audit import BEFORE, CANARIES, DURING, Audit
from dpsynth.privacy.calibrate import delta_limit, resolve_delta
from dpsynth.privacy.guarantee import Guarantee, claim
from dpsynth.privacy.ledger import Charge, Ledger
from dpsynth.privacy.mechanism import Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, from_json, to_json
from dpsynth.privacy.noise import NoiseStream, fresh_key
from dpsynth.progress import Progress
from dpsynth.train import selfcheck
from dpsynth.train.canaries import require_audit, start_up_audit
from dpsynth.train.loop import fit
from dpsynth.train.monitor import MomentMonitor
from dpsynth.train.non_private import fit_non_private
from dpsynth.train.pretrain import pretrained_weights
from dpsynth.train.pretrain_enlarger import pretrained_enlargers
from dpsynth.train.public import public_images, require_disjoint, require_public
from dpsynth.train.second_opinion import prv_epsilon
from dpsynth.trained import CLAIM, booked_digest, booking, is_booked, read_claim, write_booking

_RUN_ID, _KEY, _CHECKPOINT = "run_id", "key", "checkpoint.safetensors"  # in the site's part of the folder
_EPSILON_NOTES = 12  # how many points of the running epsilon are computed in advance for the progress bar


def train(config: Config, *, run_path: Path, ledger_path: Path, progress: Progress) -> Guarantee:
    """Train, or go on with, the run at `run_path`. Raises BudgetExceeded, SelfCheckFailed, ClaimRefused, DataError and others."""
    config = resolved(config)
    ledger = Ledger.load(ledger_path)
    require_public(config)
    run = _existing(run_path, config)
    if run is not None and (run.path / "train" / CLAIM).is_file():  # it is written last, so all that is missing is to close the run
        return _finish(run, ledger)
    if run is None or not is_booked(run):
        policy_needs.require_present(config.gate)
    data_line = ledger.data_line
    images = private_images(config, ledger, progress)
    delta = usable_delta(config, images, ledger)
    public_set = public_images(config, progress=progress)
    coarse = halved(public_set, config.halvings)
    reference = _public_constants(config, coarse, images)
    mechanisms = planned_mechanisms(config, delta=delta, queries=moment_queries(reference), interval=FINE)
    require_claimable(mechanisms, delta)
    if run is None:
        ledger.require_affordable(mechanisms)  # before minutes of pre-training; the reservation asks again
    denoiser = _pretrained(config, coarse, reference, progress)
    findings = prove_bound(config, denoiser, reference, mechanisms)
    audits = _start_up_audit(mechanisms)
    enlargers = pretrained_enlargers(config, public_set, progress=progress)
    run = run or RunFolder.create(run_path, config_text=dump_config(config))
    with run.alone("train/site") as site:
        charge, stream, split = _reserve(run, ledger, mechanisms, config, images, data_line=data_line)
        mechanisms = charge.mechanisms  # from here on, what the ledger booked and nothing else
        write_json(site / "split.json", split.record(), private=True)
        release = next((m for m in mechanisms if isinstance(m, MomentRelease)), None)
        monitor = None if release is None else MomentMonitor(mechanism=release)
        moments = noised_moments(config, split, reference, monitor, stream)
        found, audited = _fit(config, denoiser, moments, split, mechanisms, stream, site, charge.reservation, progress)
        findings |= found
        audits |= audited
        stddev = 0.0 if release is None else count_stddev(release, reference)
        generator = Generator.of(config, moments=moments, denoiser=denoiser, count_stddev=stddev)
        if monitor is not None:
            generator = _voted(config, generator, split, monitor, stream, progress)
            findings |= monitor.findings()
        write_json(site / CANARIES, {name: audit.to_json() for name, audit in audits.items()}, private=True)
        write_json(site / "selfcheck.json", selfcheck.to_json(findings), private=True)
        _require_live(findings, site)
        generator = replace(generator.with_released_detail(config.generate, progress=progress), enlargers=enlargers)
        generator.save(run.folder("train"))
        write_json(run.folder("train") / CLAIM, _claim(config, mechanisms, ledger, delta).to_json())
        return _finish(run, ledger)


def _finish(run: RunFolder, ledger: Ledger) -> Guarantee:
    """Destroy the secrets, close the stage, settle with its digest: what of this a killed run has done already is not done again."""
    charge = booking(run, ledger)
    if not run.is_complete("train"):
        for secret in (_KEY, _CHECKPOINT):
            (run.folder("train/site") / secret).unlink(missing_ok=True)
        run.complete("train", facts={"reservation": charge.reservation})
    run.require("train")
    if not charge.settled:
        ledger.settle(charge.reservation, mechanisms=charge.mechanisms, outcome_sha256=run.digest("train"))
    return read_claim(run)


def _existing(path: Path, config: Config) -> RunFolder | None:
    if not (path / "run.json").is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"Expected {path} to be a run folder or not to exist, found other files. Name another run folder.")
        return None
    run = RunFolder.open(path)
    if run.config_text != dump_config(config):
        raise ArtifactError("The configuration differs from the one this run was started with. Name another run folder, or restore it.")
    return run


def private_images(config: Config, ledger: Ledger, progress: Progress) -> ImageSet:
    """The data set of the ledger, labels in cells, images at the size that is learnt from.

    Raises LedgerError for another unit or other data, DataError for what cannot be read.
    """
    if ledger.genesis["unit"] != config.data.unit.value:
        raise LedgerError(
            f"The ledger protects the {ledger.genesis['unit']}, data.unit is {config.data.unit.value}. Use the unit of the data owner."
        )
    cohort = read_cohort(config.data)
    require_data(cohort, config.data, ledger, progress=progress)
    return halved_set(by_cell(prepare(cohort, config.data, progress=progress), config.data), config.halvings)


def usable_delta(config: Config, images: ImageSet, ledger: Ledger) -> float:
    """Delta of the run. Raises ConfigError when it is too large for the patients there are, or for the ledger."""
    delta = resolve_delta(config.privacy.delta, config.data.declared_patients)
    if delta > delta_limit(images.num_patients):
        raise ConfigError(
            f"privacy.delta {delta:.3g} is too large for this data set: expected at most 1/(10 * patients). "
            "Raise data.declared_patients or lower delta."
        )
    if delta > ledger.delta * (1 + 1e-12):
        raise ConfigError(
            f"privacy.delta {delta:.3g} is larger than the ledger's {ledger.delta:.3g}. Set privacy.delta to the ledger's value or lower."
        )
    return delta


def _public_constants(config: Config, public: Float32, private: ImageSet) -> PublicReference:
    """What is computed from the public images; the private ones, of the same size, serve only to refuse those that are among them."""
    require_disjoint(public, private.images)
    return public_reference(public, low_frequencies=config.moments.low_frequencies)


def _pretrained(config: Config, images: Float32, reference: PublicReference, progress: Progress) -> Denoiser | None:
    """The denoiser after pre-training on public images alone; none when the method has none."""
    if config.method == "moments":
        return None
    weights = pretrained_weights(config, images, reference, progress=progress)
    denoiser = Denoiser(standard_moments(config, reference), channels=config.diffusion.channels)
    denoiser.net.load_state_dict(weights)
    return denoiser


def standard_moments(config: Config, reference: PublicReference) -> Moments:
    """Moments from public constants alone, to build a net before any private ones exist."""
    classes, low = len(config.data.cells), len(reference.centre)
    pixels = int(np.prod(reference.shape))
    return Moments(
        shape=reference.shape,
        low_frequencies=reference.low_frequencies,
        counts=np.ones(classes),
        mean=np.repeat(reference.centre[None], classes, axis=0),
        covariance=np.repeat(np.eye(low)[None], classes, axis=0),
        variance=np.full((classes, pixels), 0.1),
    )


def prove_bound(
    config: Config, denoiser: Denoiser | None, reference: PublicReference, mechanisms: tuple[Mechanism, ...]
) -> dict[str, selfcheck.Finding]:
    """Prove the bound on the net itself. The moments' bound is by construction and needs no net."""
    sgd = next((m for m in mechanisms if isinstance(m, PoissonDpSgd)), None)
    if sgd is None or denoiser is None:
        return {}
    denoiser.set_trainable(config.diffusion.trainable)

    def losses(net: torch.nn.Module, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        labels = (levels * 10).long() % len(config.data.cells)
        noise = x.flip(-1)  # any fixed noise that depends on the row alone
        return denoiser.with_net(net).row_losses(x, labels, sigma=levels, noise=noise)

    findings = selfcheck.self_check(
        denoiser.net,
        selfcheck.fixed_rows(losses),
        reference.shape,
        mechanism=sgd,
        rows_per_patient=config.diffusion.draws,
    )
    selfcheck.require(findings)
    return findings


def _start_up_audit(mechanisms: tuple[Mechanism, ...]) -> dict[str, Audit]:
    """Canaries on a toy net by the engine that will train; none without DP-SGD."""
    if not any(isinstance(m, PoissonDpSgd) for m in mechanisms):
        return {}
    audit = start_up_audit()
    require_audit(audit)
    return {BEFORE: audit}


def require_claimable(mechanisms: tuple[Mechanism, ...], delta: float) -> None:
    """Raise ClaimRefused before anything is charged when the accountants will not agree on these mechanisms."""
    accounting = account(mechanisms, delta, second_opinion=prv_epsilon)
    if accounting.pld != math.inf and accounting.problems():
        raise ClaimRefused("No epsilon could be claimed, so nothing was charged: " + "; ".join(accounting.problems()) + ".")


def _reserve(
    run: RunFolder, ledger: Ledger, mechanisms: tuple[Mechanism, ...], config: Config, images: ImageSet, *, data_line: int
) -> tuple[Charge, NoiseStream, Split]:
    """The charge, the stream of random numbers and the split that follows from it: new, or those of the killed run that goes on."""

    def split() -> tuple[NoiseStream, Split]:
        stream = NoiseStream(key=(site / _KEY).read_bytes())
        return stream, split_patients(images, control_fraction=config.data.control_fraction, key=_split_key(stream))

    conditions = conditions_digest(images, config.data, salt=ledger.digest_salt)
    site, digest = run.folder("train/site"), booked_digest(run, conditions)
    if is_booked(run):
        booking(run, ledger)  # raises when it is booked elsewhere
    run_id = (site / _RUN_ID).read_text() if (site / _RUN_ID).is_file() else ""
    known = next((charge for charge in ledger.charges() if charge.run_id == run_id), None)
    if known is None:
        run_id = secrets.token_hex(8)
        write_bytes(site / _RUN_ID, run_id.encode(), private=True)
        write_bytes(site / _KEY, fresh_key(), private=True)
        try:
            drawn = split()  # before the charge: it fails when one side stays empty
            reservation = ledger.reserve(
                mechanisms,
                purpose=f"train {config.method}",
                run_id=run_id,
                config_sha256=digest,
                coins_sha256=drawn[1].commitment,
                data_line=data_line,
            )
        except (BudgetExceeded, DataError, LedgerError):
            shutil.rmtree(run.path)  # nothing was charged or trained, so nothing is left behind
            raise
    elif (site / _KEY).is_file():
        reservation, drawn = known.reservation, split()
        ledger.resume(reservation, mechanisms, config_sha256=digest, coins_sha256=drawn[1].commitment)
    else:
        raise ArtifactError("This run is charged and its secret key is gone, so it cannot go on. Its charge stays; train in a new folder.")
    write_booking(run, reservation, conditions=conditions)
    return ledger.charge(reservation), *drawn


def _split_key(stream: NoiseStream) -> bytes:
    return stream.integers("split", 0, 4).tobytes()


def _require_live(findings: dict[str, selfcheck.Finding], site: Path) -> None:
    """Raise SelfCheckFailed, and destroy what could go on from here, when training did not do what it should have."""
    if not all(finding.ok for finding in findings.values()):
        for secret in (_KEY, _CHECKPOINT):
            (site / secret).unlink(missing_ok=True)
    selfcheck.require(findings, consequence="the charge stays and the run cannot be used")


def noised_moments(config: Config, split: Split, reference: PublicReference, monitor: MomentMonitor | None, stream: NoiseStream) -> Moments:
    """The noised moments of the training patients; the monitor sees the noise."""
    training, cells = split.training, config.data.cells
    return release_moments(
        training.images,
        training.labels,
        training.patients,
        num_classes=len(training.classes),
        mechanism=None if monitor is None else monitor.mechanism,
        reference=reference,
        stream=None if monitor is None else stream,
        record=None if monitor is None else monitor.record,
        labels_of_cells=cells.labels(np.arange(len(cells))) if cells.attributes else None,
    )


def _voted(
    config: Config, generator: Generator, split: Split, monitor: MomentMonitor, stream: NoiseStream, progress: Progress
) -> Generator:
    """The generator with the candidates that the training patients voted for; as it is when no votes were booked."""
    release, training = monitor.mechanism, split.training
    if all(query.name != VOTES.name for query in release.queries):
        return generator
    shares = generator.cell_probabilities
    wanted = num_candidates(release, declared_patients=config.data.declared_patients, num_cells=len(shares))
    cells = np.repeat(np.arange(len(shares)), np.maximum(np.round(shares * wanted), 1).astype(np.int64))
    seeds = np.arange(len(cells), dtype=np.uint64)  # public, like all that candidates depend on
    candidates = generator.sample(cells, seeds, config.generate, progress=progress)
    parents = release_votes(
        candidates, cells, training.images, training.labels, training.patients, mechanism=release, stream=stream, record=monitor.record
    )
    return replace(generator, parents=parents)


def _fit(
    config: Config,
    denoiser: Denoiser | None,
    moments: Moments,
    split: Split,
    mechanisms: tuple[Mechanism, ...],
    stream: NoiseStream,
    site: Path,
    reservation: str,
    progress: Progress,
) -> tuple[dict[str, selfcheck.Finding], dict[str, Audit]]:
    """Train the denoiser in place; returns what the monitor found and what the canaries showed."""
    if denoiser is None:
        return {}, {}
    denoiser.transplant(moments)
    sgd = next((m for m in mechanisms if isinstance(m, PoissonDpSgd)), None)
    if any(isinstance(m, NonPrivate) for m in mechanisms):
        fit_non_private(denoiser, split.training, config.diffusion, stream=stream, progress=progress)
        return {}, {}
    if sgd is None:  # everything is spent on moments and votes
        return {}, {}
    notes = _running_epsilon(mechanisms, sgd, resolve_delta(config.privacy.delta, config.data.declared_patients))

    def callback(step: int) -> None:
        progress("DP-SGD", step, sgd.steps, f"epsilon spent {notes[min(n for n in notes if n >= step)]:.2f}")

    monitor = fit(
        denoiser,
        split.training,
        sgd,
        config.diffusion,
        stream=stream,
        checkpoint=site / _CHECKPOINT,
        binding=reservation,
        callback=callback,
    )
    return monitor.findings(sgd, split.training.num_patients), {} if monitor.canaries is None else {DURING: monitor.canaries}


def _running_epsilon(mechanisms: tuple[Mechanism, ...], sgd: PoissonDpSgd, delta: float) -> dict[int, float]:
    """Epsilon after so many steps, rounded up to the next of a few points; the charge in the ledger is the full one throughout."""
    points = sorted({int(np.ceil(sgd.steps * part / _EPSILON_NOTES)) for part in range(1, _EPSILON_NOTES + 1)})
    others = [mechanism for mechanism in mechanisms if mechanism is not sgd]

    def shortened(steps: int) -> Mechanism:
        return from_json({**to_json(sgd), "steps": steps})

    return {steps: epsilon_pld([*others, shortened(steps)], delta, interval=1e-3) for steps in points}


def _claim(config: Config, mechanisms: tuple[Mechanism, ...], ledger: Ledger, delta: float) -> Guarantee:
    pretraining = "procedural images" if config.pretrain.source == "phantom" else "a public image folder"
    finer = config.finer_than_learnt
    guarantee = Guarantee(
        data_name=config.data.name,
        unit=config.data.unit,
        declared_patients=config.data.declared_patients,
        mechanisms=mechanisms,
        accounting=account(mechanisms, delta, second_opinion=prv_epsilon),
        ledger_epsilon=epsilon_pld(ledger.charged_mechanisms(), delta),
        max_images_per_patient=config.data.max_images_per_patient,
        unprotected=(
            f"the declared number of patients, {config.data.declared_patients}",
            f"the list of classes, {json.dumps(list(config.data.classes))}",
            *(f"the values of {name}, {json.dumps(list(values))}" for name, values in config.data.cells.attributes),
            f"image size {list(config.data.spatial_shape)}, {config.data.channels} channels, "
            f"intensity range {json.dumps(config.data.intensity_range)}",
            *(["which images the data owner left out before training"] if config.data.exclusions else []),
            f"constants{finer and f', {finer}'} and pre-training from {pretraining}",
            "the training schedule",
            "the outcome word of each check, that the gate allowed the release, and how often it was asked",
            "the number of lines of the ledger, the digest of its last line, and the officer's words on an accepted flag",
        ),
    )
    return claim(guarantee)
