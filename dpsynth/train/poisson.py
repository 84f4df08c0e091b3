"""Poisson sampling for real: in each step every patient is drawn by an own coin."""

from __future__ import annotations

import numpy as np

from dpsynth.data.cohort import Int64
from dpsynth.privacy.noise import NoiseStream


def poisson_batch(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> Int64:
    """Numbers of the patients drawn in `step`, ascending; may be empty. The coins come from the secret stream: amplification by
    subsampling assumes that nobody can predict the batch.
    """
    return np.flatnonzero(stream.uniform("batch", step, num_patients) < probability).astype(np.int64)
