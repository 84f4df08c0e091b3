"""Gradient canaries: in the run itself, beside the weights, and before it, on a toy net whose noise is set so that half of it would show.

Both go through the sampler, the clip and the noise that training uses. In the run each canary has a coordinate of its own behind those of
the weights. The sampler's coins and the noise of the other coordinates stay what they were, bit by bit, and the canaries' coordinates
are never written to a weight: nothing that is released depends on them. See privacy/audit.py for what is made of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsynth.data.cohort import Int64
from dpsynth.errors import SelfCheckFailed
from dpsynth.privacy.audit import Audit, outcome
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream, fresh_key
from dpsynth.train.dpsgd import ENGINE, Engine, clipped_total

NUMBER = 1000  # of the canaries in a run
# Epsilon 3.1 at 1e-5. Simulated: with half of its noise it is refuted at 0.6 % in 29 of 30 runs, with all of it in none.
TOY = PoissonDpSgd(noise_multiplier=3.5, clip_norm=1.0, sampling_probability=0.9, steps=8, declared_patients=3000)
_TOY_NUMBER = 3000
_TOO_LONG = 10.0  # clip norms that a canary's gradient has before the clip
_CHUNK = 256
_FALSE_ALARM = 1e-4


@dataclass(kw_only=True)
class Canaries:
    """inside (n,): who takes part. scores (n,): sum of the noised gradients along each canary's coordinate so far, in clip norms."""

    inside: NDArray[np.bool_]
    scores: NDArray[np.float64]

    @classmethod
    def drawn(cls, stream: NoiseStream, *, scores: list[float], number: int) -> Canaries:
        """Coins from the run's stream, the same whenever it goes on; `scores` of the steps done, empty for none."""
        inside = stream.uniform("canaries", 0, number) < 0.5
        return cls(inside=inside, scores=np.array(scores) if scores else np.zeros(number))

    def total(self, drawn: Int64, *, clip_norm: float, engine: Engine) -> Tensor:
        """Clipped sum (n,) over the canaries who were drawn and take part."""
        rows = torch.from_numpy(drawn[self.inside[drawn]])
        total = torch.zeros(len(self.inside))
        for part in torch.split(rows, _CHUNK):
            if len(part):
                gradients = torch.zeros(len(part), len(self.inside))
                gradients[torch.arange(len(part)), part] = _TOO_LONG * clip_norm
                total += engine.clip([gradients], clip_norm=clip_norm)[0]
        return total

    def record(self, noised: Tensor, mechanism: PoissonDpSgd) -> None:
        """Note one step: the noised mean (n,) along the canaries' coordinates."""
        self.scores = self.scores + noised.double().numpy() * mechanism.expected_batch_size / mechanism.clip_norm


def start_up_audit(*, engine: Engine = ENGINE, key: bytes | None = None) -> Audit:
    """Run the toy mechanism on a linear net, a canary for each weight: per-patient gradients, chunks, clip and noise as in training."""
    stream = NoiseStream(key=key or fresh_key())
    canaries = Canaries.drawn(stream, scores=[], number=_TOY_NUMBER)
    net = nn.Linear(_TOY_NUMBER, 1, bias=False)
    gradients = engine.gradients(net, rows_per_patient=1)
    for step in range(TOY.steps):
        drawn = engine.sample(stream, step=step, probability=TOY.sampling_probability, num_patients=_TOY_NUMBER)
        chosen = torch.from_numpy(drawn[canaries.inside[drawn]])

        def losses(part: slice, chosen: Tensor = chosen) -> Tensor:
            x = nn.functional.one_hot(chosen[part], _TOY_NUMBER).float() * _TOO_LONG * TOY.clip_norm
            return torch.as_tensor(net(x)).squeeze(1)

        total, _ = clipped_total(gradients, losses, rows=len(chosen), rows_per_chunk=_CHUNK, clip_norm=TOY.clip_norm, engine=engine)
        canaries.record(engine.noise(total, mechanism=TOY, stream=stream, step=step), TOY)
    gradients.close()
    return outcome(canaries.scores, canaries.inside, TOY)


def require_audit(audit: Audit) -> None:
    """Raise SelfCheckFailed when the audit refutes the toy mechanism's claim; of a sound engine once in far more than 10,000 runs."""
    if audit.refuted(_FALSE_ALARM):
        raise SelfCheckFailed(
            f"The training engine does not keep its privacy bound; nothing was charged. canaries: {audit.correct} of {audit.guesses} "
            f"guesses about who took part were right, which the claimed mechanism allows at most once in {1 / _FALSE_ALARM:.0f} times"
        )
