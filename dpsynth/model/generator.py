"""A finished generator: moments and, for the diffusion method, a denoiser. What it was trained on is not in it, only what was released."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dpsynth.artifacts import read_json, write_bytes, write_json
from dpsynth.cells import Cells
from dpsynth.config import Config, GenerateConfig
from dpsynth.errors import ArtifactError
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.enlarger import Enlarger
from dpsynth.model.moments import Frequencies, Moments, frequencies, ring_energies, sample_moment_images
from dpsynth.model.sampler import STEP_NOISE, sample, schedule, starting_noise, streams_of
from dpsynth.model.spectrum import ring_gains, with_gains
from dpsynth.model.votes import Parents
from dpsynth.progress import Progress

SCHEMA = 1
SETTINGS, WEIGHTS = "generator.json", "weights.safetensors"
_COUNTED, _FEWEST_COUNTED, _COUNTED_PIXELS = 200, 40, 200 * 28**2  # images in which the strength of detail is counted


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Draws images. `denoiser` is None for the method of moments; `net_channels` are its U-Net's channels.

    With `attributes` the moments' classes are cells; `count_stddev` is that of the noise on their counts, in patients.
    With `parents` images are drawn around these; `gains` (labels, bands) bring detail nearer to the released strength (`spectrum`); each
    of `enlargers` doubles the sides of what the others draw.
    """

    classes: tuple[str, ...]
    moments: Moments
    denoiser: Denoiser | None
    net_channels: tuple[int, ...]
    texture: bool
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    count_stddev: float = 0.0
    parents: Parents | None = None
    gains: NDArray[np.float64] | None = None
    enlargers: tuple[Enlarger, ...] = ()

    @classmethod
    def of(cls, config: Config, *, moments: Moments, denoiser: Denoiser | None, count_stddev: float) -> Generator:
        """What a run of `config` released, with the settings that drawing needs."""
        return cls(
            classes=config.data.classes,
            moments=moments,
            denoiser=denoiser,
            net_channels=config.diffusion.channels,
            texture=config.moments.texture,
            attributes=config.data.cells.attributes,
            count_stddev=count_stddev,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the images that it draws, (channel, *space)."""
        channels, *sides = self.moments.shape
        return (channels, *(side * 2 ** len(self.enlargers) for side in sides))

    @property
    def cells(self) -> Cells:
        """The layout of label and attributes."""
        return Cells(classes=self.classes, attributes=self.attributes)

    @property
    def cell_probabilities(self) -> NDArray[np.float64]:
        """Frequencies of the cells as released with noise, (cells,), positive, sum 1."""
        return self.moments.probabilities

    @property
    def label_probabilities(self) -> NDArray[np.float64]:
        """Class frequencies as released with noise, (classes,), sum 1."""
        return self.cells.marginal(self.cell_probabilities, 0)

    def sample(
        self, cells: NDArray[np.int64], seeds: NDArray[np.uint64], settings: GenerateConfig, *, progress: Progress
    ) -> NDArray[np.float32]:
        """Images (n, channel, *space) in [-1, 1], image i from cell i (without attributes: label i) and seed i."""
        images = self._learnt(cells, seeds, settings, progress=progress)
        for number, enlarger in enumerate(self.enlargers):
            images = enlarger.enlarged(images, seeds, number=number, progress=progress)
        return images

    def _learnt(
        self, cells: NDArray[np.int64], seeds: NDArray[np.uint64], settings: GenerateConfig, *, progress: Progress
    ) -> NDArray[np.float32]:
        """The same at the size at which patients' images were learnt from."""
        if self.denoiser is None:
            images = sample_moment_images(self.moments, cells, seeds, texture=self.texture)
            progress("draw images", len(cells), len(cells))
            return images
        self.denoiser.eval()
        largest = self.denoiser.largest_sigma
        labels, noise = torch.from_numpy(cells), starting_noise(seeds, self.moments.shape)
        start = self.denoiser.wiener.noisy_images(noise, largest, labels)
        if self.parents is not None:
            chosen = self.parents.choose(cells, seeds)
            own = chosen >= 0
            start[own] = torch.from_numpy(self.parents.images[chosen[own]]) + largest * noise[own]
        levels = schedule(settings.steps, sigma_min=settings.sigma_min, sigma_max=largest)
        images = sample(self.denoiser, start, labels, levels=levels, streams=streams_of(seeds, STEP_NOISE), progress=progress)
        return images if self.gains is None else with_gains(images, self.gains[self.cells.labels(cells)], self._layout)

    def with_released_detail(self, settings: GenerateConfig, *, progress: Progress) -> Generator:
        """The same, whose images have detail more nearly as strong as was released: counted in some images of its own, so it is
        post-processing. The method of moments draws it as strong as that already.
        """
        if self.denoiser is None:
            return self
        count = int(np.clip(_COUNTED_PIXELS / np.prod(self.moments.shape), _FEWEST_COUNTED, _COUNTED))
        labels = np.arange(max(count, len(self.classes)), dtype=np.int64) % len(self.classes)
        rng, of_cells = np.random.default_rng(0), self.cells.labels(np.arange(len(self.cells)))
        cells = np.empty_like(labels)
        for label in range(len(self.classes)):
            own, rows = np.flatnonzero(of_cells == label), labels == label
            shares = self.cell_probabilities[own]
            cells[rows] = rng.choice(own, size=int(rows.sum()), p=shares / shares.sum())
        images = replace(self, gains=None)._learnt(cells, np.arange(len(cells), dtype=np.uint64), settings, progress=progress)
        wanted = ring_energies(self.moments.variance, self._layout)[cells]
        return replace(self, gains=ring_gains(images, labels, wanted, self._layout))

    @property
    def _layout(self) -> Frequencies:
        return frequencies(self.moments.shape, self.moments.low_frequencies)

    def save(self, folder: Path) -> None:
        """Write generator.json and weights.safetensors."""
        tensors = {f"moments.{name}": torch.from_numpy(array) for name, array in self.moments.to_arrays().items()}
        if self.denoiser is not None:
            tensors |= {f"net.{name}": tensor.contiguous() for name, tensor in self.denoiser.net.state_dict().items()}
        if self.parents is not None:
            tensors |= {f"parents.{name}": torch.from_numpy(array) for name, array in self.parents.__dict__.items()}
        for number, enlarger in enumerate(self.enlargers):
            tensors |= {f"enlarger{number}.{name}": tensor.contiguous() for name, tensor in enlarger.state_dict().items()}
        if self.gains is not None:
            tensors["gains"] = torch.from_numpy(self.gains.copy())
        write_bytes(folder / WEIGHTS, save(tensors))
        settings: dict[str, Any] = {
            "schema": SCHEMA,
            "classes": list(self.classes),
            "shape": list(self.moments.shape),
            "low_frequencies": self.moments.low_frequencies,
            "net_channels": list(self.net_channels) if self.denoiser is not None else None,
            "texture": self.texture,
            "enlargers": len(self.enlargers),
        }
        if self.attributes:
            settings |= {"attributes": [[name, list(values)] for name, values in self.attributes], "count_stddev": self.count_stddev}
        write_json(folder / SETTINGS, settings)

    @classmethod
    def load(cls, folder: Path) -> Generator:
        """Read a generator. Raises ArtifactError when the files do not fit."""
        settings = read_json(folder / SETTINGS)
        try:
            if settings["schema"] != SCHEMA:
                raise ArtifactError(f"Expected a generator of schema {SCHEMA}, found {settings['schema']!r}. Train again.")
            tensors = load_file(folder / WEIGHTS)
            arrays = {name.removeprefix("moments."): t.numpy() for name, t in tensors.items() if name.startswith("moments.")}
            moments = Moments.from_arrays(arrays, shape=tuple(settings["shape"]), low_frequencies=settings["low_frequencies"])
            channels = settings["net_channels"]
            denoiser = None
            if channels is not None:
                denoiser = Denoiser(moments, channels=tuple(channels))
                denoiser.net.load_state_dict({n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")})
            enlargers = tuple(_enlarger(tensors, number, moments.shape) for number in range(settings.get("enlargers", 0)))
            parents = {name.removeprefix("parents."): t.numpy() for name, t in tensors.items() if name.startswith("parents.")}
            return cls(
                classes=tuple(settings["classes"]),
                moments=moments,
                denoiser=denoiser,
                net_channels=tuple(channels or ()),
                texture=bool(settings["texture"]),
                attributes=tuple((name, tuple(values)) for name, values in settings.get("attributes", ())),
                count_stddev=float(settings.get("count_stddev", 0.0)),
                parents=Parents(**parents) if parents else None,
                gains=tensors["gains"].numpy() if "gains" in tensors else None,
                enlargers=enlargers,
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise ArtifactError(f"The generator in {folder.name} cannot be read ({type(error).__name__}). Train again.") from error


def _enlarger(tensors: Mapping[str, torch.Tensor], number: int, shape: tuple[int, ...]) -> Enlarger:
    """The stored one that doubles sides for the so-manieth time, of images (channel, *space)."""
    enlarger, prefix = Enlarger(channels=shape[0], dimensions=len(shape) - 1), f"enlarger{number}."
    enlarger.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    return enlarger.eval()
