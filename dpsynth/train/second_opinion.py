"""The second accountant: Opacus' PRV (Gopi et al. 2021), other authors and other numerics than the one that is claimed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from opacus.accountants import PRVAccountant

from dpsynth.privacy.mechanism import Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, merged


def prv_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon at `delta` by privacy random variables: 0 for nothing, infinity for anything non-private."""
    history: list[tuple[float, float, int]] = []
    for mechanism in merged(mechanisms):
        if isinstance(mechanism, NonPrivate):
            return math.inf
        if isinstance(mechanism, MomentRelease):
            history += [(mechanism.query_noise_multiplier(query.name), 1.0, 1) for query in mechanism.queries]
        elif isinstance(mechanism, PoissonDpSgd) and mechanism.steps:
            history.append((mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.steps))
    if not history:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = history
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # At probability 1 it evaluates log 0 in a branch that it then discards; and its first guess of the size of its grid, by RDP,
        # may say that a finer bound exists. Neither touches the answer, which must agree with PLD or nothing is claimed.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return float(accountant.get_epsilon(delta))
