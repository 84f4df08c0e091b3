"""Axes of a volume: every volume with a known geometry is brought to RAS, whatever its file's order of axes."""

from __future__ import annotations

import nibabel
import numpy as np
from numpy.typing import NDArray

from dpsynth.data.cohort import Float32, Image


def oriented(voxels: Float32, affine: NDArray[np.float64]) -> Image:
    """Turn (channel, i, j, k) with its (4, 4) affine into (channel, right, anterior, superior), without resampling.

    Axes are permuted and flipped to the nearest patient axes, as nibabel's `as_closest_canonical` does. Raises ValueError when
    the affine is singular or not finite.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:3, :3]))) < 1e-12:
        raise ValueError("the affine is singular or not finite")
    orientation = nibabel.orientations.io_orientation(affine)
    space = voxels.shape[1:]
    turned = np.stack([nibabel.orientations.apply_orientation(channel, orientation) for channel in voxels])
    turned_affine = affine @ nibabel.orientations.inv_ornt_aff(orientation, space)
    spacing = tuple(float(size) for size in np.linalg.norm(turned_affine[:3, :3], axis=0))
    return Image(voxels=np.ascontiguousarray(turned, dtype=np.float32), spacing_mm=spacing, affine=turned_affine)
