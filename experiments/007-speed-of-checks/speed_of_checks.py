"""How long the battery of checks takes, and how much memory, on images of 64 pixels.

    python experiments/007-speed-of-checks/speed_of_checks.py [--images 500 1000 5000] [--side 64]

As many synthetic as real images, one a patient, a fifth of them control patients. The "synthetic" ones are other procedural patients, so
everything passes and nothing ends early. Each size is a process of its own; times are of the parts in the order in which they run.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results import add  # noqa: E402 (an experiment is a script; what several share lies one folder up)

from dpsynth.checks.accounting import ALWAYS, REQUIRED  # noqa: E402
from dpsynth.checks.evidence import Evidence, compute_features  # noqa: E402
from dpsynth.checks.plausibility import Reference  # noqa: E402
from dpsynth.checks.screening import screen  # noqa: E402
from dpsynth.checks.suite import run_checks  # noqa: E402
from dpsynth.config import Config, DataConfig, GateConfig, PhantomConfig  # noqa: E402
from dpsynth.data.cohort import ImageSet  # noqa: E402
from dpsynth.data.preprocess import prepare  # noqa: E402
from dpsynth.data.source import read_cohort  # noqa: E402
from dpsynth.data.split import split_patients  # noqa: E402
from dpsynth.model.moments import Moments, frequencies, to_frequencies  # noqa: E402
from dpsynth.progress import silent, terminal_progress  # noqa: E402

LOW_FREQUENCIES = 12


def patients(count: int, side: int, seed: int) -> ImageSet:
    """One image each of so many procedural patients."""
    phantom = PhantomConfig(num_patients=count, max_images=1, seed=seed)
    data = DataConfig(phantom=phantom, spatial_shape=(side, side))
    return prepare(read_cohort(data), Config(data=data).data, progress=silent)


def reference(images: ImageSet) -> Reference:
    """Moments of all images in one cell, without noise."""
    layout = frequencies(images.images.shape[1:], LOW_FREQUENCIES)
    coefficients = to_frequencies(images.images)
    low = coefficients[:, layout.low]
    return Reference.of(
        Moments(
            shape=images.images.shape[1:],
            low_frequencies=LOW_FREQUENCIES,
            counts=np.array([float(len(low))]),
            mean=low.mean(axis=0)[None],
            covariance=np.cov(low, rowvar=False)[None],
            variance=np.where(layout.band < 0, 0, (coefficients**2).mean(axis=0))[None],
        )
    )


def measure(count: int, side: int) -> dict[str, float]:
    """Seconds of each part, and the largest memory of the process in MB above what the images took."""
    split = split_patients(patients(count, side, 1), control_fraction=0.2, key=b"speed of checks")
    synthetic = patients(count, side, 2)
    known = reference(patients(min(count, 1000), side, 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds: dict[str, float] = {}
    gate = GateConfig()
    with terminal_progress() as progress:
        start = time.perf_counter()
        screening = screen(synthetic.images, np.zeros(count, dtype=np.int64), known, gate.content, sample_key=b"", progress=progress)
        seconds["screening"] = time.perf_counter() - start
        evidence = Evidence(
            synthetic=synthetic.images, synthetic_labels=synthetic.labels, training=split.training, control=split.control,
            in_pool=split.in_pool, epsilon=10.0, delta=1e-5, canaries={},
            selfcheck={name: {"ok": True, "detail": ""} for name in (*ALWAYS, *REQUIRED)}, accounting_problems=(), ledger_problems=(),
            uses_sgd=True, screening=screening,
            synthetic_attributes={"sex": np.array([mapping["sex"] for mapping in synthetic.attributes])},
        )  # fmt: skip
        start = time.perf_counter()
        compute_features(evidence, progress=progress)
        seconds["features"] = time.perf_counter() - start
        start = time.perf_counter()
        verdicts = run_checks(evidence, gate, seed=0, progress=progress)  # they compute the features once more
        seconds["checks"] = time.perf_counter() - start - seconds["features"]
    broken = [verdict.check for verdict in verdicts if "broke" in verdict.reason]
    if broken:
        sys.exit(f"these checks broke: {broken}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {name: round(value, 1) for name, value in seconds.items()}
    return {**figures, "all": round(sum(seconds.values()), 1), "peak MB": round(peak), "MB before": round(before)}


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 1000, 5000])
    parser.add_argument("--side", type=int, default=64)
    arguments = parser.parse_args()
    if len(arguments.images) == 1:
        count = arguments.images[0]
        result = measure(count, arguments.side)
        add(HERE / "results.json", f"{count} images of {arguments.side} px", dict(result))
        print(count, result)
        return
    for count in arguments.images:
        subprocess.run([sys.executable, __file__, "--images", str(count), "--side", str(arguments.side)], check=True)


if __name__ == "__main__":
    main()
