"""Does an encoder of one's own, trained without labels on both sides of the pool, tell members better than the bundled one?

    python experiments/014-own-encoder/own_encoder.py [--seeds 0 1 2] [--steps 400 700 1000]
    python experiments/014-own-encoder/own_encoder.py --table          # of results.json

Half of 400 patients, one X-ray each (28 px), train a diffusion model without privacy; images are drawn after several numbers of steps,
from hardly to much overfitted. The membership score (log density ratio) is taken in several spaces, and its AUC against the coins is what
counts. The own encoder is a small convolutional net trained by contrast (SimCLR: Chen et al. 2020) on all 400, so it knows both sides
alike. Needs kermany_cxr in the folder that DPSYNTH_DATA names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsynth.checks.classifier import auc
from dpsynth.checks.encoders import bundled
from dpsynth.checks.features import encode
from dpsynth.checks.membership import density_ratio
from dpsynth.checks.statistics import standardised
from dpsynth.data.cohort import Float32
from dpsynth.data.split import split_patients
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import silent

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "baselines"), str(HERE.parent / "011-real-runs")]

from edm import EdmDenoiser, balanced, fit_public  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from real_runs import CLASSES, DRAWN, first_images  # noqa: E402
from results import by_group, known, mean_and_spread, once  # noqa: E402

_WIDTH, _FEATURES, _BATCH, _TEMPERATURE = 32, 128, 128, 0.2


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, turned, zoomed, moved, of another contrast and brightness, with grain."""
    n, draw = len(images), torch.randn((len(images), 6), generator=generator)
    turn, zoom = 0.07 * draw[:, 0], (0.1 * draw[:, 1]).exp()
    side = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    matrix = torch.stack([
        torch.stack([side * zoom * turn.cos(), -zoom * turn.sin(), 0.07 * draw[:, 2]], 1),
        torch.stack([side * zoom * turn.sin(), zoom * turn.cos(), 0.07 * draw[:, 3]], 1),
    ], 1)  # fmt: skip
    moved = F.grid_sample(
        images, F.affine_grid(matrix, list(images.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    changed = moved * (0.2 * draw[:, 4]).exp().view(-1, 1, 1, 1) + 0.1 * draw[:, 5].view(-1, 1, 1, 1)
    return changed + 0.1 * torch.randn(changed.shape, generator=generator)


def own_encoder(images: Float32, *, steps: int, seed: int) -> nn.Module:
    """Net from images (n, channel, side, side) to features (n, 128), trained so that two views of an image are alike."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU(),
        )  # fmt: skip

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(block(images.shape[1], _WIDTH), block(_WIDTH, 2 * _WIDTH), block(2 * _WIDTH, 4 * _WIDTH))
        encoder = nn.Sequential(body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * _WIDTH, _FEATURES))
        head = nn.Sequential(nn.GELU(), nn.Linear(_FEATURES, _FEATURES // 2))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-3, weight_decay=1e-4)
    everything = torch.from_numpy(images)
    for _ in range(steps):
        batch = everything[torch.randperm(len(everything), generator=generator)[:_BATCH]]
        both = torch.cat([views(batch, generator), views(batch, generator)])
        projected = F.normalize(head(encoder(both)), dim=1)
        similar = (projected @ projected.T / _TEMPERATURE).fill_diagonal_(-1e9)
        loss = F.cross_entropy(similar, torch.arange(len(both)).roll(len(batch)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return encoder.eval()


def drawn_after(split: Any, steps: int, seed: int) -> Float32:
    """Images of a diffusion model that was trained for so many steps without privacy."""
    denoiser = EdmDenoiser(split.training.images.shape[1:], len(CLASSES), seed=seed)
    fit_public(denoiser, split.training.images, split.training.labels, steps=steps, seed=seed, augment=False)
    return denoiser.draw(balanced(len(CLASSES), DRAWN), seed)


def one_run(seed: int, steps: list[int], encoder_steps: int) -> dict[str, Any]:
    """AUC of the membership score by steps and space."""
    split = split_patients(first_images(seed), control_fraction=0.5, key=f"own encoder {seed}".encode().ljust(32))
    real = np.concatenate([split.training.images, split.control.images])
    inside = (np.arange(len(real)) < split.training.num_patients).astype(np.int64)
    own = own_encoder(real[np.argsort([*split.training.patient_ids, *split.control.patient_ids])], steps=encoder_steps, seed=seed)

    @torch.no_grad()
    def own_features(images: Float32) -> Any:
        return F.normalize(own(torch.from_numpy(images)), dim=1).double().numpy()

    spaces: dict[str, Any] = {
        "bundled encoder": lambda images: encode(images, task="", progress=silent, encoder=bundled()),
        "thumbnails": thumbnails,
        "own encoder": own_features,
    }
    laid = {name: space(real) for name, space in spaces.items()}
    found: dict[str, Any] = {}
    for count in steps:
        images = drawn_after(split, count, seed)
        scores = {name: standardised(density_ratio(laid[name], space(images), np.arange(len(real)))) for name, space in spaces.items()}
        scores["the check: larger of the first two"] = np.maximum(scores["bundled encoder"], scores["thumbnails"])
        scores["largest of all three"] = np.max([scores[name] for name in spaces], axis=0)
        found[str(count)] = {name: auc(np.stack([-score, score], axis=1), inside) for name, score in scores.items()}
    return found


def table(path: Path) -> str:
    """Rows are spaces, columns numbers of steps."""
    lines = []
    for runs in by_group(known(path)).values():
        steps, spaces = list(runs[0]), list(next(iter(runs[0].values())))
        lines += ["| AUC after so many steps | " + " | ".join(steps) + " |", "|" + "---|" * (len(steps) + 1)]
        lines += [
            f"| {space} | " + " | ".join(mean_and_spread([run[step][space] for run in runs], 3) for step in steps) + " |"
            for space in spaces
        ]
    return "\n".join(lines)


def main() -> None:
    """Run what results.json lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 700, 1000])
    parser.add_argument("--encoder-steps", type=int, default=300)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    torch.set_num_threads(1)
    for seed in [] if arguments.table else arguments.seeds:
        once(path, f"own encoder/{seed}", lambda s=seed: one_run(s, arguments.steps, arguments.encoder_steps))  # type: ignore[misc]
    print(table(path))


if __name__ == "__main__":
    main()
