"""Membership for an attacker who holds the weights: does the net denoise its training patients better than others?

Weights are no part of a release, so this is for the site's own use: it is the sharper look at the same mechanism, and what is to be asked
before weights are ever handed over. It runs when the policy names it. Score of a patient: how much better than the linear filter of the
released moments the net predicts their image from noise, mean log-ratio of the squared errors over fixed noise levels (the loss attack of
Carlini et al. 2023 on diffusion models, calibrated by the filter); without a net the filter's own error. The noise is the same for
everybody and no score depends on the coins, so flipping them again is exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dpsynth.checks.evidence import Evidence, first_images
from dpsynth.checks.family import false_alarms, relied_on
from dpsynth.checks.membership import attack
from dpsynth.checks.statistics import only_above
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import LARGEST_SIGMA, GateConfig
from dpsynth.data.cohort import Float32, Int64
from dpsynth.data.halve import halved
from dpsynth.model.generator import Generator
from dpsynth.model.wiener import WienerFilter
from dpsynth.progress import Progress

Array = NDArray[np.float64]
QUESTION = "Could somebody who held the generator's weights tell who of the audit pool was trained on?"
LIMITATION = (
    "It is one attack, the loss at a few noise levels, on average over patients; attacks with shadow models see more. The weights stay at "
    "the site, so it speaks of those who can read them there, not of the recipients of images."
)
_SMALLEST_SIGMA, _LEVELS = 0.05, 8
MOST = 1000  # pool patients who are looked at, drawn without regard to their coins
_BATCH = 64


def white_box(evidence: Evidence, gate: GateConfig, *, rng: np.random.Generator, progress: Progress) -> Verdict:
    """Accuses when the coins explain the losses too badly; INCONCLUSIVE without a generator, or with too few patients to show anything."""
    verdict = Verdict.nothing_found(
        "white_box",
        question=QUESTION,
        statistic_name="AUC of the loss",
        limitation=LIMITATION,
        false_alarm_rate=false_alarms("white_box", gate),
    )
    unseen = replace(verdict, outcome=Outcome.INCONCLUSIVE)
    if evidence.generator is None:
        return replace(unseen, reason="the weights are not at hand")
    chosen = np.sort(rng.permutation(len(evidence.pool))[:MOST])
    inside = evidence.inside[chosen]
    if inside.all() or not inside.any():
        return replace(unseen, reason="one side of the pool is empty")
    images, cells = _pool(evidence, evidence.generator, evidence.pool[chosen])
    scores = loss_scores(evidence.generator, images, cells, seed=int(rng.integers(2**31)), progress=progress)
    found = attack(scores, inside, delta=evidence.delta, level=relied_on("white_box", gate), rng=rng)
    bound = f"epsilon is at least {found.epsilon:.2f} by this attack, {evidence.epsilon:.2f} is claimed"
    seen = f"an AUC of {found.detectable:.2f} would have been seen"
    verdict = replace(
        verdict,
        reason=f"no evidence (AUC {found.auc:.3f}, p {found.p:.2g}); {seen}; {bound}",
        statistic=found.auc,
        interval=(found.low, found.high),
        figures={
            "smallest detectable AUC": found.detectable,
            "patients": float(len(inside)),
            "guesses": float(found.guesses),
            "right guesses": float(found.correct),
            "epsilon at least": found.epsilon,
        },
        p_value=found.p,
        accusation=f"the weights tell who was trained on (AUC {found.auc:.3f} of the loss); {seen}; {bound}",
        lower_bound=found.epsilon,
    )
    if found.detectable > gate.largest_membership_auc:
        few = f"with {len(inside)} pool patients {only_above(found.detectable)}"
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=few)
    return verdict


def noise_levels_of(dimensions: int) -> list[float]:
    """At which noise levels images or volumes are looked at; above the largest the net is silent."""
    return [float(level) for level in np.geomspace(_SMALLEST_SIGMA, LARGEST_SIGMA[dimensions], _LEVELS)]


def loss_scores(generator: Generator, images: Float32, cells: Int64, *, seed: int, progress: Progress) -> Array:
    """Score of each image (n, channel, *space) of its cell (n,): higher means better predicted than an image of somebody else."""
    draw = torch.Generator().manual_seed(seed)
    sigmas = noise_levels_of(images.ndim - 2)
    noise = torch.randn((len(sigmas), *images.shape[1:]), generator=draw)
    scores = np.zeros(len(images))
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        clean, labels = torch.from_numpy(images[part]), torch.from_numpy(cells[part])
        for sigma, own in zip(sigmas, noise, strict=True):
            scores[part] -= _log_error(generator, clean, labels, sigma, own) / len(sigmas)
        progress("losses of the pool", min(start + _BATCH, len(images)), len(images))
    return scores


@torch.no_grad()
def _log_error(generator: Generator, clean: torch.Tensor, labels: torch.Tensor, sigma: float, noise: torch.Tensor) -> Array:
    """Log of the squared error of each row (n,), as part of the linear filter's where there is a net."""
    levels, shared = torch.full((len(clean),), sigma), noise.expand_as(clean)
    denoiser = generator.denoiser
    linear, error = (WienerFilter(generator.moments) if denoiser is None else denoiser.wiener)(clean + sigma * shared, levels, labels)
    floor = ((clean - linear).flatten(1) / error[:, None]).square().mean(1)
    if denoiser is None:
        return np.asarray(floor.clamp(min=1e-12).log().double().numpy())
    loss = denoiser.eval().row_losses(clean, labels, sigma=levels, noise=shared)
    return np.asarray((loss.clamp(min=1e-12) / floor.clamp(min=1e-12)).log().double().numpy())


def _pool(evidence: Evidence, generator: Generator, patients: Int64) -> tuple[Float32, Int64]:
    """First images of the patients (numbers as in `Evidence.pool`), at the size that was learnt from, and their cells."""
    images = np.concatenate([first_images(evidence.training), first_images(evidence.control)])
    sides = (evidence.training, evidence.control)
    cells = [generator.cells.index(side.labels, side.attributes)[[int(rows[0]) for rows in side.rows_of()]] for side in sides]
    return halved(images[patients], len(generator.enlargers)), np.concatenate(cells)[patients]
