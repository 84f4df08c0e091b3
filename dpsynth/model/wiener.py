"""The best linear denoiser for Gaussian images with given class-wise moments."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from dpsynth.model.moments import Moments, frequencies


class WienerFilter(nn.Module):
    """E[x | x + sigma * noise] for x of a class, exact for a Gaussian: dense in the low block, diagonal above it.

    Works in the cosine domain, so it costs one small matrix product per axis whatever the image size.
    """

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        layout = frequencies(moments.shape, moments.low_frequencies)
        self.shape = moments.shape
        pairs = [np.linalg.eigh(covariance) for covariance in moments.covariance]
        self._constant("low", torch.from_numpy(layout.low))
        self._constant("mean", _tensor(moments.mean))
        self._constant("values", _tensor(np.maximum(np.stack([values for values, _ in pairs]), 1e-6)))
        self._constant("vectors", _tensor(np.stack([vectors for _, vectors in pairs])))
        diagonal = _tensor(moments.variance).clone()
        diagonal[:, layout.low] = 0
        self._constant("diagonal", diagonal)
        for axis, side in enumerate(moments.shape[1:]):
            self._constant(f"transform{axis}", _tensor(dct(np.eye(side), axis=0, norm="ortho")))

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """noisy (n, channel, *space), sigma (n,), labels (n,) to the posterior mean (n, channel, *space) and its rms error (n,)."""
        coefficients = self._cosine(noisy, inverse=False).flatten(1)
        variance = sigma.square()[:, None]
        diagonal = self.get_buffer("diagonal")[labels]
        posterior = coefficients * diagonal / (diagonal + variance)
        values = self.get_buffer("values")[labels]
        posterior[:, self.get_buffer("low")] = self._low(coefficients[:, self.get_buffer("low")], values / (values + variance), labels)
        left = (values * variance / (values + variance)).sum(1) + (diagonal * variance / (diagonal + variance)).sum(1)
        error = (left / coefficients.shape[1]).sqrt()
        return self._cosine(posterior.view_as(noisy), inverse=True), error

    def noisy_images(self, normal: Tensor, sigma: float, labels: Tensor) -> Tensor:
        """Images of the classes with noise of `sigma` on them, from standard normal numbers of the same shape (n, channel, *space).

        What the probability flow (Karras et al. 2022) makes of a Gaussian from far above, in closed form. The root of the covariance is
        the symmetric one: the signs of eigenvectors differ between machines, and images of one seed must not.
        """
        normal = normal.flatten(1)
        coefficients = normal * (self.get_buffer("diagonal")[labels] + sigma**2).sqrt()
        place, vectors = self.get_buffer("low"), self.get_buffer("vectors")
        stddev = (self.get_buffer("values") + sigma**2).sqrt()
        low = torch.empty_like(normal[:, place])
        for label, mean in enumerate(self.get_buffer("mean")):
            rows = labels == label
            low[rows] = mean + normal[rows][:, place] @ vectors[label] * stddev[label] @ vectors[label].T
        coefficients[:, place] = low
        return self._cosine(coefficients.view(-1, *self.shape), inverse=True)

    def _low(self, low: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
        out = torch.empty_like(low)
        mean, vectors = self.get_buffer("mean"), self.get_buffer("vectors")
        for label in range(len(mean)):
            rows = (labels == label).nonzero()[:, 0]
            if len(rows):
                centred = (low[rows] - mean[label]) @ vectors[label]
                out[rows] = mean[label] + (centred * gain[rows]) @ vectors[label].T
        return out

    def _cosine(self, images: Tensor, *, inverse: bool) -> Tensor:
        for axis in range(len(self.shape) - 1):
            matrix = self.get_buffer(f"transform{axis}")
            moved = images.movedim(axis + 2, -1)
            images = (moved @ (matrix if inverse else matrix.T)).movedim(-1, axis + 2)
        return images.contiguous()


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
