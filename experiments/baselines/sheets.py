"""Sheets of what finished runs of a row drew, one line a method and epsilon, each class in a block of its own.

    python experiments/baselines/sheets.py --rows pneumonia kermany adrenal [--work runs/baselines] [--out docs/samples]
    DPSYNTH_DATA=... python experiments/baselines/sheets.py --rows pneumonia --real --out sheets    # real images on top: keep it

Volumes are shown by their middle slice. Images of one class are the first that the run drew, none is chosen by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from compare import METHODS, ROWS, WITHOUT_EPSILON, split_of
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dpsynth.data.candidates import to_8_bit

Pixels = NDArray[np.uint8]
_PER_CLASS, _MARGIN, _GAP, _LARGEST_SIDE = 6, 110, 4, 84


def line(images: Pixels, labels: NDArray[np.int64], classes: int) -> Pixels:
    """The first images (n, channel, *space) of each class side by side, (height, width)."""
    blocks = []
    for label in range(classes):
        chosen = images[labels == label][:_PER_CLASS, 0]
        flat = chosen[:, chosen.shape[1] // 2] if chosen.ndim == 4 else chosen
        row = np.zeros((flat.shape[1], _PER_CLASS * flat.shape[2]), dtype=np.uint8)
        for number, picture in enumerate(flat):
            row[:, number * flat.shape[2] : (number + 1) * flat.shape[2]] = picture
        blocks += [row, np.full((row.shape[0], _GAP), 255, dtype=np.uint8)]
    return np.concatenate(blocks[:-1], axis=1)


def sheet(lines: dict[str, Pixels], factor: int) -> Image.Image:
    """Lines with their names on the left, each pixel `factor` large."""
    height, width = next(iter(lines.values())).shape
    step = height * factor + _GAP
    page = Image.new("L", (_MARGIN + width * factor, step * len(lines) - _GAP), 255)
    for number, (name, pixels) in enumerate(lines.items()):
        large = Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        page.paste(large, (_MARGIN, number * step))
        ImageDraw.Draw(page).text((4, number * step + height * factor // 2 - 6), name, fill=0)
    return page


def finished(row: str, seed: int, work: Path) -> dict[str, Path]:
    """Images of finished runs by what they are called."""
    found = {}
    for epsilon in sorted(ROWS[row].epsilons, reverse=True):
        for method in METHODS:
            name = "inf" if method in WITHOUT_EPSILON else f"{epsilon:g}"
            path = work / f"{row}-{name}" / f"{method}-{seed}" / "images.npz"
            if path.is_file():
                found[method if method in WITHOUT_EPSILON else f"{method}, {epsilon:g}"] = path
    return found


def main() -> None:
    """One PNG a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--out", type=Path, default=Path("docs/samples"))
    parser.add_argument("--real", action="store_true", help="Real images in the first line.")
    arguments = parser.parse_args()
    for row in arguments.rows:
        classes, lines = len(ROWS[row].data["classes"]), {}
        if arguments.real:
            real = split_of(row, arguments.seed, arguments.work.resolve()).training
            lines["real"] = line(to_8_bit(real.images), real.labels, classes)
        for name, path in finished(row, arguments.seed, arguments.work).items():
            with np.load(path, allow_pickle=False) as arrays:
                lines[name] = line(arrays["images"], arrays["labels"], classes)
        if not lines:
            sys.exit(f"{row}: no finished run in {arguments.work}. Run compare.py first.")
        arguments.out.mkdir(parents=True, exist_ok=True)
        side = max(1, _LARGEST_SIDE // ROWS[row].data["spatial_shape"][-1])
        sheet(lines, side).save(arguments.out / f"{row}.png", optimize=True)


if __name__ == "__main__":
    main()
