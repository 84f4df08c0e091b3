"""Training without a guarantee, for comparison only: the ledger books infinity and the gate refuses."""

from __future__ import annotations

import numpy as np
import torch

from dpsynth.config import DiffusionConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.ema import Ema
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import Progress
from dpsynth.train.loop import draw_rows


def fit_non_private(denoiser: Denoiser, training: ImageSet, settings: DiffusionConfig, *, stream: NoiseStream, progress: Progress) -> None:
    """Plain training in place with the same rows, batches and optimiser, without clipping and without noise."""
    denoiser.set_trainable(settings.trainable)
    denoiser.train()
    parameters = [parameter for parameter in denoiser.net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, settings.learning_rate, betas=(0.9, 0.99))
    ema = Ema(denoiser.net, decay=settings.ema_decay)
    rows_of = training.rows_of()
    size = max(1, round(settings.sampling_probability * training.num_patients))
    for step in range(settings.steps):
        chosen = np.argsort(stream.uniform("batch", step, training.num_patients))[:size].astype(np.int64)
        rows = draw_rows(training, rows_of, chosen, draws=settings.draws, stream=stream, step=step)
        optimizer.zero_grad()
        for start in range(0, len(rows.clean), 64):
            part = slice(start, start + 64)
            losses = denoiser.row_losses(rows.clean[part], rows.labels[part], sigma=rows.sigma[part], noise=rows.noise[part])
            (losses.sum() / len(rows.clean)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(denoiser.net)
        progress("training without privacy", step + 1, settings.steps, "epsilon infinite")
    ema.copy_to(denoiser.net)
