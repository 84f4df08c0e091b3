"""What can a detector do that has seen no patient, beside the easy and wrong ways to train one?

python experiments/010-detector/detector.py --public brain        # about 2 minutes on one core
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dpsynth.artifacts import RunFolder, read_json
from dpsynth.config import load_config
from dpsynth.data.candidates import load_candidates, to_8_bit
from dpsynth.data.phantom import phantom_images
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import restore_split
from dpsynth.detector.evaluation import quality
from dpsynth.detector.model import Detector, fit
from dpsynth.detector.traces import traces
from dpsynth.model.generator import Generator
from dpsynth.progress import silent
from dpsynth.train.detector import train_detector

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from results import once  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from verbs import train_and_generate  # noqa: E402

Pixels = NDArray[np.uint8]
CONFIG = """\
method: diffusion
data:
  {{format: phantom, name: phantom-chest, classes: [normal, lesion], declared_patients: 1000, spatial_shape: [20, 20],
   phantom: {{anatomy: chest, num_patients: 1000, max_images: 1, seed: {seed}}}}}
privacy: {{epsilon: 10, delta: 1e-5}}
moments: {{low_frequencies: 10}}
pretrain: {{source: phantom, anatomies: [{public}], num_phantoms: 600, steps: 120, seed: {seed}}}
diffusion: {{trainable: small, steps: 5, sampling_probability: 0.05}}
generate: {{count: 300}}
"""


def jpeg(images: Pixels) -> Pixels:
    """Saved with loss at quality 75, and read again."""
    found = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[0]).save(buffer, format="JPEG", quality=75)
        found.append(np.asarray(Image.open(buffer))[None])
    return np.stack(found)


def resized(images: Pixels) -> Pixels:
    """Enlarged to twice the size and made small again."""
    x = F.interpolate(torch.from_numpy(images.astype(np.float32)), scale_factor=2, mode="bicubic")
    smaller = F.interpolate(x, scale_factor=0.5, mode="bilinear").numpy()
    return np.asarray(np.clip(np.rint(smaller), 0, 255), dtype=np.uint8)


def judged(detector: Detector, real: Pixels, synthetic: Pixels) -> dict[str, float]:
    """Quality on both, and the shares above one half."""
    rows = traces(real), traces(synthetic)
    sides = detector.of_traces(rows[0]), detector.of_traces(rows[1])
    shares = {
        "real of a known kind": float(detector.knows(rows[0]).mean()),
        "synthetic of a known kind": float(detector.knows(rows[1]).mean()),
        "real called synthetic": float((sides[0] > 0.5).mean()),
        "synthetic recognised": float((sides[1] > 0.5).mean()),
    }
    return {**quality(*sides).to_json(), **{name: round(value, 4) for name, value in shares.items()}}


def run(seed: int, anatomy: str) -> dict[str, Any]:
    """Train, draw, and judge patients who were not trained on beside candidates, as no site could do without paying for it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "config.yaml").write_text(CONFIG.format(seed=seed, public=anatomy))
        train_and_generate(home, epsilon=10, delta=1e-5)
        config, trained = load_config(home / "config.yaml"), RunFolder.open(home / "run")
        split = restore_split(
            prepare(read_cohort(config.data), config.data, progress=silent), read_json(home / "run/train/site/split.json")
        )
        patients, candidates = to_8_bit(split.control.images), load_candidates(trained).images
        generator = Generator.load(trained.folder("train"))
        detector = train_detector(config, generator, candidates, progress=silent)  # generate would withhold a useless one
    public = {
        name: to_8_bit(
            phantom_images(anatomies=(name,), num_images=300, spatial_shape=(20, 20), channels=1, num_classes=2, seed=seed + 900)[0]
        )
        for name in ("chest", "brain")
    }
    easy = fit(traces(public[anatomy]), {"release": traces(candidates[::2])}, shape=detector.shape, evaluation={})
    changes: dict[str, Callable[[Pixels], Pixels]] = {"as they are": lambda x: x, "JPEG 75": jpeg, "enlarged and made small again": resized}
    return {
        "evaluation": dict(detector.evaluation),
        **{f"patients and candidates, {name}": judged(detector, change(patients), change(candidates)) for name, change in changes.items()},
        **{f"other public {name} images and candidates": judged(detector, images, candidates) for name, images in public.items()},
        "easy and wrong: candidates against public images, on patients": judged(easy, patients, candidates[1::2]),
    }


def main() -> None:
    """Run what is missing in results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--public", choices=("chest", "brain"), default="chest", help="what the public images show; the hospital's show chests"
    )
    arguments = parser.parse_args()
    once(HERE / "results.json", f"public {arguments.public}/{arguments.seed}", lambda: run(arguments.seed, arguments.public))


if __name__ == "__main__":
    main()
