"""The geometry of a phantom: what is drawn once for a patient, what changes between images, and how it becomes a picture.

Coordinates run from -1 to 1 along each side: x to the right of the picture, y downwards, z through the volume (0 in a picture).
Brightness is 0 for air and 1 for the densest structure.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A soft ellipsoid: centre and radii in (x, y, z)."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    strength: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Everything of a patient that all their images share. `shape` holds standard normal deviations of the geometry."""

    name: str
    shape: tuple[float, ...]
    male: bool
    age: float  # (years - 58) / 40
    contrast: float
    gamma: float
    roughness: float  # exponent of the 1/f texture
    texture: float  # its amplitude
    tint: tuple[float, float, float]
    findings: tuple[Blob, ...]
    haze: float  # amplitude of a fine pattern all over the organ


@dataclass(frozen=True, kw_only=True)
class Pose:
    """What differs between two images of one patient."""

    angle: float
    shift: tuple[float, float]
    scale: float
    exposure: float
    contrast: float
    noise: float


def draw_anatomy(rng: np.random.Generator, *, anatomy: str, label: int, male: bool, age: float, site: int, variety: float) -> Anatomy:
    """A patient's body. `variety` 1 is a cohort of one kind; larger values spread every property."""
    shape = tuple((np.clip(rng.standard_normal(16), -2.2, 2.2) * variety**0.5).tolist())
    findings, haze = _findings(rng, anatomy=anatomy, label=label)
    spread = variety * rng.standard_normal(3)
    return Anatomy(
        name=anatomy,
        shape=shape,
        male=male,
        age=age,
        contrast=float(np.clip((1.0, 0.8)[site] + 0.05 * spread[0], 0.5, 1.3)),
        gamma=float(np.exp((0.0, 0.15)[site] + 0.06 * spread[1])),
        roughness=float(1.4 + 0.15 * spread[2]),
        texture=float(0.035 * variety * rng.uniform(0.6, 1.4)),
        tint=(float(rng.uniform(0.6, 0.8)), 1.0, float(rng.uniform(1.2, 1.6))),
        findings=findings,
        haze=haze,
    )


def draw_pose(rng: np.random.Generator, *, variety: float) -> Pose:
    """Pose, exposure and noise of one image."""
    values = np.clip(rng.standard_normal(6), -2.5, 2.5) * variety**0.5
    return Pose(
        angle=0.03 * values[0],
        shift=(0.02 * values[1], 0.02 * values[2]),
        scale=float(np.exp(0.025 * values[3])),
        exposure=0.035 * values[4],
        contrast=float(np.exp(0.06 * values[5])),
        noise=float(rng.uniform(0.01, 0.025)),
    )


def _findings(rng: np.random.Generator, *, anatomy: str, label: int) -> tuple[tuple[Blob, ...], float]:
    """Kinds in turn: one consolidation, several nodules, fluid at the base, a fine pattern; then the same again, stronger."""
    if label == 0:
        return (), 0.0
    kind, round_ = (label - 1) % 4, (label - 1) // 4
    strength = 0.27 * rng.uniform(0.7, 1.4) * (1 + 0.4 * round_)
    if kind == 3:
        return (), float(0.10 * rng.uniform(0.8, 1.3) * (1 + 0.4 * round_))
    count = int(rng.integers(3, 6)) if kind == 1 else 1
    radius = {0: rng.uniform(0.17, 0.3), 1: rng.uniform(0.07, 0.11), 2: rng.uniform(0.25, 0.34)}[kind]
    blobs = []
    for _ in range(count):
        side = -1 if rng.random() < 0.5 else 1
        height = 0.42 if kind == 2 else rng.uniform(-0.4, 0.3)
        across = side * (0.45 if anatomy == "chest" else rng.uniform(0.2, 0.5)) + 0.06 * rng.standard_normal()
        radii = (radius * rng.uniform(0.8, 1.3), radius * rng.uniform(0.8, 1.3), radius * 1.5)
        centre = (across, height, 0.3 * rng.uniform(-1, 1))
        if anatomy == "organ":  # is in the middle
            centre = (0.3 * centre[0], 0.3 * centre[1], 0.3 * centre[2])
        blobs.append(Blob(centre=centre, radii=radii, strength=strength))
    return tuple(blobs), 0.0


def render(rng: np.random.Generator, body: Anatomy, pose: Pose, spatial_shape: tuple[int, ...]) -> Grid:
    """The picture in 0..1 before exposure, shape `spatial_shape`."""
    x, y, z = _grid(spatial_shape)
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    x, y = x - pose.shift[0], y - pose.shift[1]
    x, y = (cos * x - sin * y) / pose.scale, (sin * x + cos * y) / pose.scale
    picture, organ = _ANATOMIES[body.name](body, x, y, z)
    texture = _texture(rng, spatial_shape, body.roughness)
    for blob in body.findings:
        distance = sum(((c - m) / r) ** 2 for c, m, r in zip((x, y, z), blob.centre, blob.radii, strict=True))
        picture = picture + blob.strength * organ * np.exp(-0.5 * distance**1.3) * (1 + 0.35 * texture)
    if body.haze:
        picture = picture + body.haze * organ * np.abs(_texture(rng, spatial_shape, 0.3))
    return np.asarray(picture + body.texture * texture * (0.3 + picture), dtype=np.float64)


@functools.lru_cache(maxsize=8)
def _grid(spatial_shape: tuple[int, ...]) -> tuple[Grid, Grid, Grid]:
    axes = [(np.arange(side) + 0.5) / side * 2 - 1 for side in spatial_shape]
    grids = np.meshgrid(*axes, indexing="ij")
    if len(grids) == 2:
        return grids[1], grids[0], np.zeros(spatial_shape)
    return grids[2], grids[1], grids[0]


@functools.lru_cache(maxsize=8)
def _frequencies(spatial_shape: tuple[int, ...]) -> Grid:
    axes = [np.fft.fftfreq(side) for side in spatial_shape[:-1]] + [np.fft.rfftfreq(spatial_shape[-1])]
    squared = sum(grid**2 for grid in np.meshgrid(*axes, indexing="ij"))
    return np.asarray(np.sqrt(np.maximum(squared, 1 / max(spatial_shape) ** 2)))


def _texture(rng: np.random.Generator, spatial_shape: tuple[int, ...], exponent: float) -> Grid:
    """Noise with amplitude 1/f**exponent, mean 0 and standard deviation 1."""
    white = np.fft.rfftn(rng.standard_normal(spatial_shape)) / _frequencies(spatial_shape) ** exponent
    field = np.fft.irfftn(white, s=spatial_shape, axes=tuple(range(len(spatial_shape))))
    return np.asarray((field - field.mean()) / field.std())


def _inside(distance: Grid, softness: float) -> Grid:
    """About 1 where `distance` < 1, about 0 where it is larger, with a soft edge."""
    return np.asarray(0.5 - 0.5 * np.tanh((distance - 1) / softness))


def _radius(x: Grid, y: Grid, z: Grid, centre: tuple[float, float], radii: tuple[float, float], depth: float) -> Grid:
    squared = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + (z / depth) ** 2
    return np.sqrt(squared)


def _chest(body: Anatomy, x: Grid, y: Grid, z: Grid) -> tuple[Grid, Grid]:
    s = body.shape
    width = (0.35 if body.male else 0.32) + 0.025 * s[0]
    height = (0.64 if body.male else 0.58) + 0.05 * s[1] - 0.05 * body.age
    middle = -0.1 + 0.05 * s[2]
    narrowing = 1 + 0.28 * np.clip(-(y - middle), 0, None)  # the apex of a lung is narrower than its base
    trunk = _inside(_radius(x * (1 + 0.18 * np.clip(-y - 0.55, 0, None)), y, z, (0, 0.35), (0.98 + 0.05 * s[3], 1.7), 1.2), 0.09)
    neck = _inside(np.abs(x) / (0.3 + np.clip(y + 1.0, 0, None) * 3.5), 0.25)
    trunk = trunk * neck
    left = _radius(x * narrowing, y, z, (0.43 + 0.02 * s[4], middle), (width, height), 1.0)
    right = _radius(x * narrowing, y, z, (-0.43 - 0.02 * s[5], middle), (width * 1.04, height), 1.0)
    lungs = np.maximum(_inside(left, 0.14), _inside(right, 0.14))
    dome = 0.5 + 0.06 * s[6] + 0.25 * (np.abs(x) - 0.4) ** 2 - 0.05 * (x < 0)
    lungs = lungs * _inside(1 + (y - dome), 0.06)
    heart_width = 0.27 + 0.04 * s[7] + 0.05 * body.age
    heart = _inside(_radius(x + 0.35 * (y - 0.2), y, z, (0.1, 0.22 + 0.04 * s[8]), (heart_width, 0.33), 0.7), 0.16)
    vessels = np.exp(-(((np.abs(x) - 0.2) / 0.12) ** 2) - ((y + 0.05) / 0.2) ** 2)  # at the hila
    spine = np.exp(-((x / (0.1 + 0.01 * s[9])) ** 2)) * (0.85 + 0.15 * np.cos(22 * y + 3 * s[10]))
    pitch = 0.2 + 0.012 * s[11]
    along = y + 0.55 * (np.abs(x) - 0.42) ** 2 - 0.22 * np.abs(x) + 0.05 * s[12]
    cage = _inside(np.maximum(left, 0) * (x > 0) + np.maximum(right, 0) * (x <= 0), 0.25)
    ribs = np.clip(np.cos(2 * np.pi * along / pitch) - 0.35, 0, None) * cage * _inside(1 + (y - dome), 0.1)
    air = lungs * (1 - 0.85 * heart) * (1 - 0.6 * np.exp(-((x / 0.12) ** 2)))
    picture = trunk * (0.62 + 0.06 * s[13] * 0.5) - (0.42 + 0.025 * s[14]) * air * trunk
    picture = picture + trunk * (0.13 * heart + 0.15 * spine + 0.09 * ribs + 0.1 * vessels * air) + 0.03
    return picture, lungs * (1 - 0.7 * heart)


def _brain(body: Anatomy, x: Grid, y: Grid, z: Grid) -> tuple[Grid, Grid]:
    s = body.shape
    across, along = (0.69 if body.male else 0.66) + 0.05 * s[0], 0.84 + 0.04 * s[1]
    radius = _radius(x, y, z, (0, 0), (across, along), 0.95)
    angle = np.arctan2(x, -y)
    folds = 0.028 * np.cos((14 + round(s[2])) * angle + 3 * s[3]) + 0.022 * np.cos((23 + round(s[4])) * angle + 9 * z + 5 * s[5])
    atrophy = 0.03 * body.age
    scalp = np.exp(-(((radius - 1.06) / 0.05) ** 2))
    cortex = _inside(radius / (0.9 - 0.5 * atrophy + 0.3 * folds), 0.05)
    white = _inside(radius / (0.72 - atrophy + 0.04 * s[6] * 0.5 + 1.3 * folds), 0.07)
    size = 1 + 0.35 * body.age + 0.12 * s[7]
    horn = np.abs(x) - 0.1 - 0.12 * np.abs(y + 0.02) - 0.012 * s[8]
    ventricles = np.exp(-((horn / (0.065 * size)) ** 2) - (((y + 0.02) / (0.3 * size)) ** 2) ** 1.5 - (z / 0.45) ** 2)
    fissure = np.exp(-((x / 0.03) ** 2)) * _inside(np.abs(np.abs(y) - 0.68) / 0.24, 0.2)
    deep = np.exp(-(((np.abs(x) - 0.24) / 0.09) ** 2) - ((y - 0.08) / 0.17) ** 2 - (z / 0.4) ** 2)
    grey_level, white_level = 0.42 + 0.02 * s[9], 0.66 + 0.03 * s[10]
    picture = cortex * grey_level + (white_level - grey_level) * white * (1 - 0.8 * deep)
    picture = picture * (1 - 0.8 * ventricles) * (1 - 0.45 * fissure) + 0.55 * scalp + 0.03
    bias = 1 + 0.07 * (s[11] * x + s[12] * y + s[13] * x * y)
    return np.asarray(picture * bias), white * (1 - ventricles)


def _organ(body: Anatomy, x: Grid, y: Grid, z: Grid) -> tuple[Grid, Grid]:
    """One solid body of two or three limbs on dark ground, as in a crop around an organ or in its mask; its edge is sharp or soft."""
    s = body.shape
    size = 0.3 * np.exp(0.18 * s[0] - 0.2 * body.age)
    distance = _radius(x, y, z, (0.0, 0.0), (size, size * np.exp(0.3 * s[1])), 1.3 * size)
    for limb in (0, 1):
        turn, tilt = 0.9 + 0.5 * s[2 + limb] + 2.6 * limb, 0.5 * s[4 + limb]
        across, along = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        along, depth = np.cos(tilt) * along - np.sin(tilt) * z, np.cos(tilt) * z + np.sin(tilt) * along
        reach = 0.45 * np.exp(0.2 * s[6 + limb])
        bent = across + 0.3 * s[8 + limb] * along**2
        width = 0.16 * np.exp(0.25 * s[10 + limb])
        distance = np.minimum(distance, _radius(bent, along - 0.7 * reach, depth, (0.0, 0.0), (width, reach), 0.3))
    solid = _inside(distance, 0.1 * np.exp(0.6 * s[12]))
    ground = 0.1 * s[13] - 0.15  # mostly black, whatever the exposure
    return solid * (0.65 + 0.15 * s[14]) + ground * (1 - solid), solid


_ANATOMIES = {"chest": _chest, "brain": _brain, "organ": _organ}
