"""How long the battery of checks takes, and how much memory, on images of 64 pixels.

    python experiments/007-speed-of-checks/speed_of_checks.py [--images 500 1000 2000 5000] [--side 64]
    python experiments/007-speed-of-checks/speed_of_checks.py --copying 1000 5000 20000 50000
    python experiments/007-speed-of-checks/speed_of_checks.py --table     # of results.json

As many synthetic as real images, one a patient, a fifth of them control patients. The "synthetic" ones are other procedural patients, so
everything passes and nothing ends early. Each size is a process of its own, whose memory is its own largest resident set (VmHWM). Seconds
are by the clock and of the processor: where others use the machine, the second are what the work costs.

The search for copies alone is measured on smooth noise, which is quicker to make than patients and no quicker to search.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results import add, known  # noqa: E402 (an experiment is a script; what several share lies one folder up)

from dpsynth.checks.accounting import ALWAYS, REQUIRED  # noqa: E402
from dpsynth.checks.evidence import Evidence  # noqa: E402
from dpsynth.checks.kept import Arrays  # noqa: E402
from dpsynth.checks.plausibility import Reference  # noqa: E402
from dpsynth.checks.screening import screen  # noqa: E402
from dpsynth.checks.search import approaches  # noqa: E402
from dpsynth.checks.suite import run_checks  # noqa: E402
from dpsynth.config import Config, DataConfig, GateConfig, PhantomConfig  # noqa: E402
from dpsynth.data.cohort import ImageSet  # noqa: E402
from dpsynth.data.preprocess import prepare  # noqa: E402
from dpsynth.data.source import read_cohort  # noqa: E402
from dpsynth.data.split import split_patients  # noqa: E402
from dpsynth.model.moments import Moments, frequencies, to_frequencies  # noqa: E402
from dpsynth.progress import silent, terminal_progress  # noqa: E402

LOW_FREQUENCIES = 12
PARTS = ("screening", "search", "features", "classifier", "other checks")


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


@dataclass
class Clock:
    """Seconds of the clock and of the processor by part."""

    wall: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what is done under this."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.processor[part] = self.processor.get(part, 0.0) + time.process_time() - processor

    def figures(self) -> dict[str, Any]:
        """Everything, for results.json."""
        return {
            "seconds": {name: round(value, 1) for name, value in self.wall.items()},
            "processor seconds": {name: round(value, 1) for name, value in self.processor.items()},
            "all, seconds": round(sum(self.wall.values()), 1),
            "all, processor seconds": round(sum(self.processor.values()), 1),
            "threads": torch.get_num_threads(),
        }


def peak_megabytes() -> int:
    """Largest resident set of this process since it began; ru_maxrss would hold that of its parent as well."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) // 1024


def measure(count: int, side: int) -> dict[str, Any]:
    """Seconds of each part, and the largest memory of the process beside what it held before."""
    split = split_patients(patients(count, side, 1), control_fraction=0.2, key=b"speed of checks")
    synthetic = patients(count, side, 2)
    known_moments = reference(patients(min(count, 1000), side, 3))
    before, clock, gate = peak_megabytes(), Clock(), GateConfig()

    def keep(name: str, make: Callable[[], Arrays]) -> Arrays:
        with clock(name.split()[0]):
            return make()

    with terminal_progress() as progress:
        with clock("screening"):
            screening = screen(
                synthetic.images, np.zeros(count, dtype=np.int64), known_moments, gate.content, sample_key=b"", progress=progress
            )
        evidence = Evidence(
            synthetic=synthetic.images, synthetic_labels=synthetic.labels, training=split.training, control=split.control,
            in_pool=split.in_pool, epsilon=10.0, delta=1e-5, canaries={},
            selfcheck={name: {"ok": True, "detail": ""} for name in (*ALWAYS, *REQUIRED)}, accounting_problems=(), ledger_problems=(),
            uses_sgd=True, screening=screening,
            synthetic_attributes={"sex": np.array([mapping["sex"] for mapping in synthetic.attributes])},
        )  # fmt: skip
        with clock("all"):
            verdicts = run_checks(evidence, gate, seed=0, progress=progress, keep=keep)
    broken = [verdict.check for verdict in verdicts if "broke" in verdict.reason]
    if broken:
        sys.exit(f"these checks broke: {broken}")
    for seconds in (clock.wall, clock.processor):
        seconds["other checks"] = seconds.pop("all") - sum(seconds[part] for part in ("search", "features", "classifier"))
    return {**clock.figures(), "peak MB": peak_megabytes(), "MB before": before}


def smooth(count: int, side: int, seed: int) -> NDArray[np.float32]:
    """Noise of 8 x 8 values enlarged, (count, 1, side, side)."""
    noise = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32))
    return F.interpolate(noise, size=(side, side), mode="bilinear").numpy()


def measure_copying(count: int, side: int) -> dict[str, Any]:
    """Seconds of the search of so many images among as many patients. Images are of side 32, since they are averaged down to 14 anyway."""
    queries, real, clock = smooth(count, side, 0), smooth(count, side, 1), Clock()
    before = peak_megabytes()
    with terminal_progress() as progress, clock("search"):
        found = approaches(queries, real, np.arange(count), progress=progress)
    if len(found.item) != count:
        sys.exit("the search lost images")
    return {**clock.figures(), "peak MB": peak_megabytes(), "MB before": before}


def tables(path: Path) -> str:
    """The tables of the README."""
    battery, copying = [], []
    for name, r in known(path).items():
        clock, processor = f"{r['all, seconds']:.0f} s", f"{r['all, processor seconds']:.0f} s"
        memory = f"{r['peak MB']} MB ({r['MB before']} MB)"
        if name.startswith("copying"):
            copying.append(f"| {name.split()[1]} | {clock} | {processor} | {memory} |")
            continue
        parts = " | ".join(f"{r['processor seconds'][part]:.1f} s" for part in PARTS)
        battery.append(f"| {name.split()[0]} | {parts} | {processor} | {clock} | {memory} |")
    heads = [
        "| images a side | "
        + " | ".join(PARTS)
        + " | all, processor | all, clock | peak memory (before) |\n|---"
        + "|---" * (len(PARTS) + 3)
        + "|",
        "| images and patients | clock | processor | peak memory (before) |\n|---|---|---|---|",
    ]
    of_number = lambda row: int(row.split("|")[1])  # noqa: E731
    return "\n".join([heads[0], *sorted(battery, key=of_number), "", heads[1], *sorted(copying, key=of_number)])


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[])
    parser.add_argument("--copying", type=int, nargs="*", default=[])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    images = arguments.images or ([] if arguments.copying or arguments.table else [500, 1000, 2000, 5000])
    if len(images) == 1 and not arguments.copying:
        add(HERE / "results.json", f"{images[0]} images of {arguments.side} px", measure(images[0], arguments.side))
    elif len(arguments.copying) == 1 and not images:
        add(HERE / "results.json", f"copying {arguments.copying[0]}", measure_copying(arguments.copying[0], 32))
    else:
        for option, counts in (("--images", images), ("--copying", arguments.copying)):
            for count in counts:
                subprocess.run([sys.executable, __file__, option, str(count), "--side", str(arguments.side)], check=True)
    print(tables(HERE / "results.json"))


if __name__ == "__main__":
    main()
