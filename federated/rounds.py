"""What one round computes on a site's patients: the trainer of dpsynth, called with a mechanism that the ledger has booked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpsynth.config import Config, DataConfig, PretrainConfig
from dpsynth.data.split import Split
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.moment_release import Summaries, Told, fewest_axes, moment_queries, noised_answer, told_before, width_of
from dpsynth.model.moments import Moments, PublicReference, frequencies, public_reference
from dpsynth.model.noised_sums import NoisedSums
from dpsynth.privacy.audit import BEFORE, DURING, Audit
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train import selfcheck
from dpsynth.train.canaries import require_audit, start_up_audit
from dpsynth.train.loop import fit
from dpsynth.train.monitor import MomentMonitor
from dpsynth.train.public import public_images
from dpsynth.train.run import prove_bound, standard_moments
from federated.messages import Arrays, Code, Plan, Refused, require_arrays

MOMENTS, NET, TOLD, SUMS = "moments.", "net.", "told.", "sums"
_SMALLEST_RATIO = 1e-6  # of energies to public ones in a message: far below what a query can tell
Expected = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What follows from a plan and public images alone."""

    config: Config
    reference: PublicReference

    @classmethod
    def of(cls, config: Config) -> Model:
        """Draw the procedural images and compute the public constants."""
        shape, low = (config.data.channels, *config.learnt_shape), config.moments.low_frequencies
        return cls(config=config, reference=_procedural_reference(config.pretrain, shape, low))

    def denoiser(self) -> Denoiser:
        """A denoiser of the plan's size under public moments, its weights from a fixed seed."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = Denoiser(standard_moments(self.config, self.reference), channels=self.config.diffusion.channels)
        denoiser.set_trainable(self.config.diffusion.trainable)
        return denoiser

    def release(self, plan: Plan) -> MomentRelease:
        """What a site books for moments over all of their rounds: the plan's noise, clip norms of public constants."""
        return MomentRelease(noise_multiplier=plan.moments_noise_multiplier, queries=moment_queries(self.reference))

    def told(self, arrays: Arrays, query: str) -> Told:
        """What the queries before `query` told, from a message. Raises Refused(ARRAYS) when it is not what they can tell."""
        shapes = told_before(query, len(self.config.data.cells), self.reference)
        require_arrays(arrays, {TOLD + name: ("<f8", shape) for name, shape in shapes.items()})
        values = {name: np.array(arrays[TOLD + name]) for name in shapes}
        axes = float(values.pop("axes")[0]) if "axes" in values else None
        low = len(self.reference.principal.variances)
        impossible = [
            axes is not None and not (axes.is_integer() and fewest_axes(low) <= axes <= low),
            "counts" in values and (values["counts"].min() < 0 or not values["counts"].any()),
            any(values[name].min() < _SMALLEST_RATIO for name in ("scales", "energies") if name in values),
        ]
        if any(impossible):
            raise Refused(Code.ARRAYS)
        return Told(**values, axes=None if axes is None else int(axes))

    def expected_sums(self, query: str, told: Told) -> Expected:
        """Name, type and shape of the noised sums of a query."""
        return {SUMS: ("<f8", (len(self.config.data.cells), width_of(query, told, self.reference)))}

    def expected_moments(self) -> Expected:
        """Names, types and shapes of moments."""
        cells, pixels = len(self.config.data.cells), int(np.prod(self.reference.shape))
        low = len(frequencies(self.reference.shape, self.reference.low_frequencies).low)
        shapes = {"counts": (cells,), "mean": (cells, low), "covariance": (cells, low, low), "variance": (cells, pixels)}
        return {MOMENTS + name: ("<f8", shape) for name, shape in shapes.items()}

    def expected_weights(self, *, trainable: bool) -> Expected:
        """Names, types and shapes of the net's weights: all that go to a site, or the trained ones that come back."""
        parameters = self.denoiser().net.named_parameters()
        return {NET + name: ("<f4", tuple(p.shape)) for name, p in parameters if p.requires_grad or not trainable}

    def moments(self, arrays: Arrays) -> Moments:
        """Moments from a message."""
        own = {name.removeprefix(MOMENTS): np.array(array) for name, array in arrays.items() if name.startswith(MOMENTS)}
        return Moments.from_arrays(own, shape=self.reference.shape, low_frequencies=self.reference.low_frequencies)

    def with_weights(self, arrays: Arrays) -> Denoiser:
        """The denoiser with moments and weights of a message. Raises Refused(ARRAYS) when they do not fit."""
        require_arrays(arrays, self.expected_moments() | self.expected_weights(trainable=False))
        denoiser = self.denoiser()
        load_weights(denoiser, arrays)
        denoiser.transplant(self.moments(arrays))
        return denoiser


@lru_cache(maxsize=8)
def _procedural_reference(pretrain: PretrainConfig, shape: tuple[int, ...], low_frequencies: int) -> PublicReference:
    """Public constants of procedural images: the same for all sites of a plan, so many sites in one process compute them once."""
    layout = DataConfig.model_validate({"channels": shape[0], "spatial_shape": shape[1:]})
    procedural = pretrain.model_copy(update={"source": "phantom", "path": None})
    images = public_images(Config(data=layout, pretrain=procedural), progress=silent)
    return public_reference(images, low_frequencies=low_frequencies)


def sgd_of(plan: Plan, *, steps: int, declared_patients: int) -> PoissonDpSgd:
    """What a site that declares so many patients books for DP-SGD by this plan. Raises Refused(STEPS) where no round trains."""
    if plan.noise_multiplier is None:
        raise Refused(Code.STEPS)
    return PoissonDpSgd(
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        sampling_probability=plan.sampling_probability,
        steps=steps,
        declared_patients=declared_patients,
    )


@lru_cache(maxsize=256)  # of many sites in one process, each has its own
def model_of(config_json: str) -> Model:
    """The model of a configuration in JSON; kept, since rounds of a study ask for the same one."""
    return Model.of(Config.model_validate_json(config_json))


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the engine proved of a round: findings and audits by canaries, by the names that the checks know."""

    findings: Mapping[str, selfcheck.Finding]
    audits: Mapping[str, Audit]

    def with_more(self, findings: Mapping[str, selfcheck.Finding], audits: Mapping[str, Audit]) -> Proof:
        """The same with more."""
        return Proof(findings={**self.findings, **findings}, audits={**self.audits, **audits})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the site alone."""
        audits = {name: audit.to_json() for name, audit in self.audits.items()}
        return {"findings": selfcheck.to_json(dict(self.findings)), "audits": audits}


Record = Callable[[Proof], None]


@lru_cache(maxsize=256)
def require_bound(config_json: str, mechanism: PoissonDpSgd) -> Proof:
    """Raise SelfCheckFailed unless the trainer keeps its bound on a net of this size. Weights of a message do not matter: they change
    a patient's gradient, and whatever it is, it is clipped. What was proved is kept, as long as the process lives.
    """
    model = model_of(config_json)
    findings = prove_bound(model.config, model.denoiser(), model.reference, (mechanism,))
    return Proof(findings=findings, audits={BEFORE: _audited()})


@cache
def _audited() -> Audit:
    """Canaries on a toy net, once a process."""
    audit = start_up_audit()
    require_audit(audit)
    return audit


def moments_round(
    model: Model, split: Split, told: Told, *, mechanism: MomentRelease, stream: NoiseStream, record: Record
) -> dict[str, NDArray[Any]]:
    """The site's noised sums of the mechanism's one query. Raises SelfCheckFailed when the noise was not what was booked."""
    (query,), training = mechanism.queries, split.training
    monitor = MomentMonitor(mechanism=mechanism)
    release = NoisedSums(
        labels=training.labels,
        patients=training.patients,
        num_classes=len(training.classes),
        mechanism=mechanism,
        stream=stream,
        record=monitor.record,
    )
    images = Summaries.of(training.images, training.labels, model.reference)
    sums = noised_answer(query, images, told, model.reference, release)
    findings = monitor.findings()
    record(Proof(findings=findings, audits={}))
    selfcheck.require(findings, consequence="the charge stays")
    return {SUMS: sums}


def told_arrays(told: Told) -> dict[str, NDArray[np.float64]]:
    """What is known so far, for the message of the next query."""
    return {TOLD + name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in vars(told).items() if value is not None}


def moments_arrays(moments: Moments) -> dict[str, NDArray[Any]]:
    """Moments for a message."""
    return {MOMENTS + name: array for name, array in moments.to_arrays().items()}


def train_round(
    denoiser: Denoiser,
    model: Model,
    split: Split,
    *,
    mechanism: PoissonDpSgd,
    stream: NoiseStream,
    checkpoint: Path,
    binding: str,
    proved: Proof,
    record: Record,
    callback: Callable[[int], None],
) -> dict[str, NDArray[Any]]:
    """The trained weights after the mechanism's steps, from where the denoiser stands. Raises SelfCheckFailed."""
    monitor = fit(
        denoiser,
        split.training,
        mechanism,
        model.config.diffusion,
        stream=stream,
        checkpoint=checkpoint,
        binding=binding,
        callback=callback,
    )
    findings = monitor.findings(mechanism, split.training.num_patients)
    record(proved.with_more(findings, {} if monitor.canaries is None else {DURING: monitor.canaries}))
    selfcheck.require(findings, consequence="the charge stays")
    return weights_of(denoiser, trainable=True)


def weights_of(denoiser: Denoiser, *, trainable: bool) -> dict[str, NDArray[Any]]:
    """The net's weights by name, for a message."""
    parameters = denoiser.net.named_parameters()
    return {NET + name: p.detach().numpy().copy() for name, p in parameters if p.requires_grad or not trainable}


def load_weights(denoiser: Denoiser, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the weights of `arrays` into the net."""
    with torch.no_grad():
        for name, parameter in denoiser.net.named_parameters():
            if NET + name in arrays:
                parameter.copy_(torch.from_numpy(np.array(arrays[NET + name])))
