"""First-order and co-occurrence features, which radiology has read off images since Haralick (1973); names as in IBSI (Zwanenburg 2020).

Grey levels are fixed bins of [-1, 1], the same for every image, so features of two sets can be compared.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.data.cohort import Float32, Int64

Array = NDArray[np.float64]
LEVELS = 16
FIRST_ORDER = ("mean", "standard deviation", "skewness", "kurtosis", "10th percentile", "90th percentile", "entropy", "uniformity")
TEXTURE = ("contrast", "dissimilarity", "homogeneity", "angular second moment", "correlation", "joint entropy")
NAMES = (*FIRST_ORDER, *TEXTURE)
_TINY = 1e-12
_BLOCK = 256


def radiomics(images: Float32) -> Array:
    """Features (n, 14) in the order of `NAMES`, of images (n, channel, *space) in [-1, 1]; channels are averaged."""
    blocks = [images[start : start + _BLOCK].mean(axis=1, dtype=np.float64) for start in range(0, len(images), _BLOCK)]
    return np.concatenate([np.concatenate([first_order(grey), texture(cooccurrence(levels(grey)))], axis=1) for grey in blocks])


def levels(grey: Array) -> Int64:
    """Grey levels 0..15 of images in [-1, 1]."""
    return np.clip(((grey + 1) / 2 * LEVELS).astype(np.int64), 0, LEVELS - 1)


def first_order(grey: Array) -> Array:
    """(n, 8) of images (n, *space); skewness and kurtosis (excess) of a constant image are 0."""
    flat = grey.reshape(len(grey), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1)
    scaled = centred / np.maximum(deviation, _TINY)[:, None]
    constant = deviation < _TINY
    low, high = np.percentile(flat, (10, 90), axis=1)
    shares = _counted(levels(flat), np.repeat(np.arange(len(flat)), flat.shape[1]), len(flat), LEVELS) / flat.shape[1]
    columns = [
        flat.mean(axis=1),
        deviation,
        np.where(constant, 0.0, (scaled**3).mean(axis=1)),
        np.where(constant, 0.0, (scaled**4).mean(axis=1) - 3),
        low,
        high,
        _entropy(shares),
        (shares**2).sum(axis=1),
    ]
    return np.stack(columns, axis=1)


def cooccurrence(grey_levels: Int64) -> Array:
    """Shares of pairs of neighbouring levels, (n, 16, 16), symmetric: distance 1 in each direction (4 in a picture, 13 in a volume)."""
    n, dimensions = len(grey_levels), grey_levels.ndim - 1
    total = np.zeros((n, LEVELS * LEVELS))
    offsets = [o for o in itertools.product((-1, 0, 1), repeat=dimensions) if o > (0,) * dimensions]
    for offset in offsets:
        here = tuple(slice(max(0, -o), min(s, s - o)) for o, s in zip(offset, grey_levels.shape[1:], strict=True))
        there = tuple(slice(max(0, o), min(s, s + o)) for o, s in zip(offset, grey_levels.shape[1:], strict=True))
        pairs = (grey_levels[:, *here] * LEVELS + grey_levels[:, *there]).reshape(n, -1)
        total += _counted(pairs, np.repeat(np.arange(n), pairs.shape[1]), n, LEVELS * LEVELS)
    square = total.reshape(n, LEVELS, LEVELS)
    square = square + square.transpose(0, 2, 1)
    return np.asarray(square / square.sum(axis=(1, 2), keepdims=True))


def texture(shares: Array) -> Array:
    """(n, 6) of co-occurrence shares (n, 16, 16); the correlation of a constant image is 1."""
    i, j = np.meshgrid(np.arange(LEVELS), np.arange(LEVELS), indexing="ij")
    away = np.abs(i - j)
    marginal = shares.sum(axis=2)
    mean = marginal @ np.arange(LEVELS)
    variance = marginal @ np.arange(LEVELS) ** 2 - mean**2
    covariance = (shares * (i * j)).sum(axis=(1, 2)) - mean**2
    columns = [
        (shares * away**2).sum(axis=(1, 2)),
        (shares * away).sum(axis=(1, 2)),
        (shares / (1 + away**2)).sum(axis=(1, 2)),
        (shares**2).sum(axis=(1, 2)),
        np.where(variance < _TINY, 1.0, covariance / np.maximum(variance, _TINY)),
        _entropy(shares.reshape(len(shares), -1)),
    ]
    return np.stack(columns, axis=1)


def _counted(values: Int64, images: Int64, n: int, bins: int) -> Array:
    return np.bincount(images * bins + values.ravel(), minlength=n * bins).reshape(n, bins).astype(np.float64)


def _entropy(shares: Array) -> Array:
    return np.asarray(-(shares * np.log2(np.maximum(shares, _TINY))).sum(axis=1))


def kolmogorov_smirnov(first: Array, second: Array) -> tuple[Array, Array]:
    """Statistic and p-value of each column, (d,) each, of (n, d) against (m, d)."""
    results = [stats.ks_2samp(a, b, method="asymp") for a, b in zip(first.T, second.T, strict=True)]
    return np.array([r.statistic for r in results]), np.array([r.pvalue for r in results])


def benjamini_hochberg(p: Array, rate: float) -> NDArray[np.bool_]:
    """Which of the hypotheses (d,) are rejected at a false discovery rate (Benjamini and Hochberg 1995)."""
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
    rejected = np.zeros(len(p), dtype=np.bool_)
    rejected[order[: below[-1] + 1 if len(below) else 0]] = True
    return rejected
