"""Before anything is reserved: does the engine keep the bound that the accounting assumes, on the very net that will be trained?

Every check uses public random rows and a key of its own. A failed check stops the run by name. Statistical checks have a false-alarm
probability of 1e-6 each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from dpsynth.errors import SelfCheckFailed
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream, fresh_key
from dpsynth.train.dpsgd import ENGINE, Engine

FALSE_ALARM = 1e-6
_TOLERANCE = 1e-4
_SAMPLER_PATIENTS, _SAMPLER_STEPS = 400, 120
_FEWEST_FOR_SCATTER, _SMALLEST_VARIANCE = 10, 4.0  # below them the approximation has more false alarms than stated (simulated)


class RowLosses(Protocol):
    """Losses of rows (rows,) of a net on rows x (rows, *shape), whatever else they need being fixed by the row number."""

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Losses, (rows,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One answer: `statistic` must not pass `threshold` (or must lie in the stated range, see `detail`)."""

    ok: bool
    detail: str
    statistic: float
    threshold: float


def self_check(
    net: nn.Module,
    row_losses: RowLosses,
    row_shape: tuple[int, ...],
    *,
    mechanism: PoissonDpSgd,
    rows_per_patient: int,
    engine: Engine = ENGINE,
) -> dict[str, Finding]:
    """All findings by name. The net is copied and its weights are shaken, so that no zero-initialised layer hides an error."""
    stream = NoiseStream(key=fresh_key())
    net = _shaken(net)
    patients = 3
    x = torch.from_numpy(stream.normal("rows", 0, patients * rows_per_patient * int(np.prod(row_shape)))).float()
    x = x.reshape(patients * rows_per_patient, *row_shape)
    before = _state(net)
    with torch.no_grad():
        row_losses(net, x)
    findings = {"buffers_unchanged": _unchanged(before, net)}
    try:
        bench = _Bench(net, row_losses, rows_per_patient, engine)
        findings["gradients_exact"] = _gradients_exact(bench, x)
        findings["contribution_bounded"] = _contribution_bounded(bench, x, mechanism.clip_norm, engine)
        by_opacus = f"; by Opacus' functorch for {', '.join(bench.engine.by_opacus)}" if bench.engine.by_opacus else ""
        findings["all_parameters_covered"] = Finding(
            ok=True, detail=f"every trainable parameter has a per-patient gradient{by_opacus}", statistic=0, threshold=0
        )
    except SelfCheckFailed as error:
        findings["all_parameters_covered"] = Finding(ok=False, detail=str(error), statistic=1, threshold=0)
    except Exception as error:  # whatever the net's own code does when it is run by patient
        detail = f"the net cannot be run by patient ({type(error).__name__}: {error}). Freeze or replace the layer"
        findings["all_parameters_covered"] = Finding(ok=False, detail=detail, statistic=1, threshold=0)
    if findings["buffers_unchanged"].ok:  # a net may behave otherwise when gradients are asked for
        findings["buffers_unchanged"] = _unchanged(before, net)
    length = max(10_000, sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad))
    findings["noise_scale"] = _noise_scale(mechanism, stream, engine, length)
    findings["sampler_poisson"] = sampler_finding(mechanism.sampling_probability, stream, engine)
    return findings


def require(findings: Mapping[str, Finding], *, consequence: str = "nothing was charged") -> None:
    """Raise SelfCheckFailed that names every failed check."""
    failed = [f"{name}: {finding.detail}" for name, finding in findings.items() if not finding.ok]
    if failed:
        raise SelfCheckFailed(f"The training engine does not keep its privacy bound; {consequence}. " + "; ".join(failed))


def to_json(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Plain values by name."""
    return {
        name: {
            "ok": bool(f.ok),
            "detail": f.detail,
            "statistic": float(min(f.statistic, 1e300)),
            "threshold": float(f.threshold),
        }
        for name, f in findings.items()
    }


def _shaken(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def _state(net: nn.Module) -> dict[str, Tensor]:
    state = {**net.state_dict(), **{f"buffer {name}": tensor for name, tensor in net.named_buffers()}}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _unchanged(before: Mapping[str, Tensor], net: nn.Module) -> Finding:
    after = _state(net)
    changed = [name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])]
    detail = (
        f"a forward pass rewrites {changed[0]} from raw images (batch statistics or codebook)"
        if changed
        else "no buffer changes in a forward pass"
    )
    return Finding(ok=not changed, detail=detail, statistic=len(changed), threshold=0)


class _Bench:
    """Per-patient gradients of the net by the engine, and by the plain way, one patient at a time."""

    def __init__(self, net: nn.Module, row_losses: RowLosses, rows: int, engine: Engine) -> None:
        self.plain, self.row_losses, self.rows = copy.deepcopy(net), row_losses, rows
        self.net = net
        self.engine = engine.gradients(net, rows_per_patient=rows)

    def fast(self, x: Tensor) -> list[Tensor]:
        return self.engine.per_patient(lambda: self.row_losses(self.net, x))

    def slow(self, x: Tensor) -> Tensor:
        parameters = [parameter for parameter in self.plain.parameters() if parameter.requires_grad]
        rows = []
        for patient in torch.split(x, self.rows):
            loss = self.row_losses(self.plain, patient).mean()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)


def _gradients_exact(bench: _Bench, x: Tensor) -> Finding:
    slow = bench.slow(x)
    if not (bool(torch.isfinite(slow).all()) and bool((slow.norm(dim=1) > 0).all())):
        detail = "the net's gradients on the check's rows (standard normal) are zero or not finite, so nothing can be told from them"
        return Finding(ok=False, detail=detail, statistic=float("inf"), threshold=_TOLERANCE)
    layouts = [x.contiguous()] + ([x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [])
    worst = 0.0
    for layout in layouts:
        fast = torch.cat([gradient.flatten(1) for gradient in bench.fast(layout)], dim=1)
        if fast.shape != slow.shape:
            return Finding(ok=False, detail=f"{len(fast)} gradients for {len(slow)} patients", statistic=float("inf"), threshold=_TOLERANCE)
        if not bool(torch.isfinite(fast).all()):  # max() would pass over what is not a number
            return Finding(ok=False, detail="per-patient gradients are not finite", statistic=float("inf"), threshold=_TOLERANCE)
        worst = max(worst, float(((fast - slow).norm(dim=1) / slow.norm(dim=1)).max()))
    detail = f"per-patient gradients differ from one patient at a time by {worst:.1e} (relative), contiguous and channels_last inputs"
    return Finding(ok=worst <= _TOLERANCE, detail=detail, statistic=worst, threshold=_TOLERANCE)


def _contribution_bounded(bench: _Bench, x: Tensor, clip_norm: float, engine: Engine) -> Finding:
    """Remove each patient, and replace one by an extreme one: the clipped sum may move by no more than the clip norm.

    Also at half the smallest norm of a gradient here: a net that happens to have short gradients, or one that takes the size out of its
    input, would not show that nothing is clipped.
    """
    shortest = float(torch.cat([gradient.flatten(1) for gradient in bench.fast(x)], dim=1).norm(dim=1).min())
    limits = {clip_norm, min(clip_norm, shortest / 2) or clip_norm}
    worst, rows = 0.0, bench.rows
    for scale in (1.0, 1e3):
        rowset = x.clone()
        rowset[:rows] *= scale
        everyone = bench.fast(rowset)
        clipped = {limit: engine.clip(everyone, clip_norm=limit) for limit in limits}
        worst = max(worst, *(float(norms.max()) / limit for limit, (_, norms) in clipped.items()))
        for patient in range(len(rowset) // rows):
            others = bench.fast(torch.cat([rowset[: patient * rows], rowset[(patient + 1) * rows :]]))
            for limit, (total, _) in clipped.items():
                without, _ = engine.clip(others, clip_norm=limit)
                worst = max(worst, float((total.double() - without.double()).norm()) / limit)
    detail = f"one patient moves the clipped sum by at most {worst:.4f} clip norms; clipping must keep it at 1"
    return Finding(ok=worst <= 1 + _TOLERANCE, detail=detail, statistic=worst, threshold=1 + _TOLERANCE)


def _noise_scale(mechanism: PoissonDpSgd, stream: NoiseStream, engine: Engine, length: int) -> Finding:
    """Chi-square of the noise that an empty batch gets: 20,000 numbers, two steps; none of them may come twice."""
    draws = [
        engine.noise(torch.zeros(length), mechanism=mechanism, stream=stream, step=step).numpy() * mechanism.expected_batch_size
        for step in (0, 1)
    ]
    if len(np.unique(draws)) < 0.999 * 2 * length:
        return Finding(
            ok=False, detail="noise numbers repeat within a step or between two, or there are none", statistic=0, threshold=FALSE_ALARM
        )
    return noise_finding(float(np.sum(np.square(draws))) / mechanism.noise_stddev**2, 2 * length)


def noise_finding(energy: float, degrees: int) -> Finding:
    """Two-sided chi-square test of noise energy in units of the booked variance."""
    p = 2 * min(stats.chi2.cdf(energy, degrees), stats.chi2.sf(energy, degrees))
    detail = f"noise has {np.sqrt(energy / degrees):.4f} of the booked standard deviation over {degrees} numbers"
    return Finding(ok=p >= FALSE_ALARM, detail=detail, statistic=float(p), threshold=FALSE_ALARM)


def sampler_finding(probability: float, stream: NoiseStream, engine: Engine) -> Finding:
    """Inclusion frequency, spread of batch sizes, overlap of successive batches, times drawn: all as independent coins would have them.

    Another key must draw other batches, so that nobody can predict them.
    """
    if probability >= 1:
        return Finding(ok=True, detail="every patient is in every step", statistic=1, threshold=0)
    enough = int(1.2 * _SMALLEST_VARIANCE / (probability * (1 - probability)))  # for the scatter of sizes and of times drawn to be testable
    n, steps = (min(6000, max(least, enough)) for least in (_SAMPLER_PATIENTS, _SAMPLER_STEPS))
    other = NoiseStream(key=fresh_key())
    first, second = (
        [engine.sample(s, step=k, probability=probability, num_patients=n).tolist() for k in range(8)] for s in (stream, other)
    )
    if first == second and any(first):
        return Finding(ok=False, detail="two keys drew the same batches; Poisson sampling is required", statistic=0, threshold=FALSE_ALARM)
    drawn = np.zeros((steps, n), dtype=np.int64)
    for step in range(steps):
        drawn[step, engine.sample(stream, step=step, probability=probability, num_patients=n)] = 1
    sizes = drawn.sum(axis=1)
    inclusion = stats.binomtest(int(sizes.sum()), n * steps, probability).pvalue
    spread = dispersion_p(sizes, n, probability)
    expected = n * probability**2
    overlap = float((drawn[1:] * drawn[:-1]).sum())
    pairs = stats.norm.sf(abs(overlap - expected * (steps - 1)) / np.sqrt(expected * (1 + 2 * probability) * (steps - 1))) * 2
    per_patient = drawn.sum(axis=0)
    patients = dispersion_p(per_patient, steps, probability)
    p = min(float(inclusion), spread, float(pairs), patients) * 4  # Bonferroni over the four
    detail = (
        f"inclusion frequency {sizes.mean() / n:.4f} of {probability:.4f}, p-values: inclusion {inclusion:.2g}, batch sizes {spread:.2g}, "
        f"overlap of successive batches {pairs:.2g}, times drawn {patients:.2g}; Poisson sampling is required"
    )
    return Finding(ok=p >= FALSE_ALARM, detail=detail, statistic=min(p, 1.0), threshold=FALSE_ALARM)


def dispersion_p(counts: np.ndarray[Any, np.dtype[np.int64]], trials: int, probability: float) -> float:
    """Two-sided p-value that counts scatter as Binomial(trials, probability) does; 1 when they are too few or too small to tell.

    The sum of squares has mean n and variance n (2 + excess kurtosis); it is compared with a scaled chi-square of those moments.
    """
    variance, n = trials * probability * (1 - probability), len(counts)
    if n * min(variance, 1.0) < _FEWEST_FOR_SCATTER or variance < _SMALLEST_VARIANCE:
        return 1.0
    statistic = float(np.sum((counts - trials * probability) ** 2) / variance)
    scale = (2 + (1 - 6 * probability * (1 - probability)) / variance) / 2
    tails = stats.chi2.cdf(statistic / scale, n / scale), stats.chi2.sf(statistic / scale, n / scale)
    return float(min(1.0, 2 * min(tails)))


def fixed_rows(losses: Callable[[nn.Module, Tensor, Tensor], Tensor], *, seed: int = 0) -> RowLosses:
    """Row losses whose random numbers depend on a row's content alone, so that leaving a patient out leaves the others as they were."""

    def row_losses(net: nn.Module, x: Tensor) -> Tensor:
        levels = torch.linspace(0.3, 1.7, 7)[(x.flatten(1)[:, :4].sum(1).abs() * 10).long() % 7] + seed
        return losses(net, x, levels)

    return row_losses
