"""Two procedural hospitals that experiments share: one plays the private set, the other is public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dpsynth.config import Config
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.preprocess import prepare
from dpsynth.data.raster import write_png
from dpsynth.data.source import read_cohort
from dpsynth.model.moments import from_frequencies, to_frequencies
from dpsynth.progress import silent

CLASSES = ("normal", "finding")
PUBLIC, TEST = 1000, 500  # people of the public hospital; others of the private one, for testing
DELTA = 1e-5


def other_hospital(images: Float32) -> Float32:
    """The images (n, 1, h, w) turned by 3 degrees, moved, 8 % larger, darker and softer."""
    turn = 0.92 * torch.tensor([[np.cos(0.06), -np.sin(0.06), 0.03], [np.sin(0.06), np.cos(0.06), -0.05]])
    grid = F.affine_grid(turn.float().expand(len(images), -1, -1), list(images.shape), align_corners=False)
    moved = F.grid_sample(torch.from_numpy(images), grid, padding_mode="border", align_corners=False).numpy()
    darker = 0.9 * (2 * np.clip((moved + 1) / 2, 0, 1) ** 1.25 - 1) + 0.05
    radius = np.hypot(*np.meshgrid(*(np.arange(side) / side for side in images.shape[2:]), indexing="ij"))
    return from_frequencies(to_frequencies(darker.astype(np.float32)) * ((1 + 8 * radius) ** -0.15).ravel(), images.shape[1:])


def people(count: int, seed: int) -> tuple[Float32, list[str]]:
    """One image each of so many procedural people (28 px), and their labels."""
    cohort = phantom_cohort(
        anatomy="chest", num_patients=count, max_images=1, spatial_shape=(28, 28), channels=1, classes=CLASSES,
        seed=seed, name="people",
    )  # fmt: skip
    images = np.stack([record.read().voxels for record in cohort.records]).astype(np.float32) / np.float32(127.5) - 1
    return images, [cohort.classes[record.label] for record in cohort.records]


def public_folder(work: Path) -> Path:
    """The other hospital's images as a folder that a user would have."""
    folder = work / "public"
    if not (folder / "table.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images, labels = people(PUBLIC, 5)
        rows = ["file,patient_id,label"]
        for index, (image, label) in enumerate(zip(other_hospital(images), labels, strict=True)):
            write_png(folder / f"{index}.png", np.clip(image, -1, 1), text={})
            rows.append(f"{index}.png,{index},{label}")
        (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def settings(*, patients: int, epsilon: float, count: int, work: Path) -> dict[str, Any]:
    """What a user of the private hospital would write who has so many patients and wants so many images."""
    return {
        "method": "diffusion",
        "data": {
            "format": "phantom", "name": "people", "unit": "image", "classes": CLASSES, "declared_patients": patients,
            "spatial_shape": [28, 28], "control_fraction": 0.02,
            "phantom": {"anatomy": "chest", "num_patients": patients, "max_images": 1, "seed": 77},
        },
        "privacy": {"epsilon": epsilon, "delta": DELTA},
        "pretrain": {
            "source": "raster", "path": str(public_folder(work)), "classes": CLASSES, "steps": 700, "cache": str(work / "cache"),
        },
        "generate": {"count": count},
    }  # fmt: skip


def private_and_test(config: Config) -> tuple[ImageSet, tuple[Float32, Int64]]:
    """The private set, and other people of that hospital with their labels."""
    private = prepare(read_cohort(config.data), config.data, progress=silent)
    images, names = people(TEST, 1077)
    return private, (images, np.array([private.classes.index(name) for name in names]))
