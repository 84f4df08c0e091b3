"""What privacy costs in time and memory: one training step of our engine, of Opacus in three modes, and of no privacy at all, side by side.

    python experiments/002-engine-speed/engine_speed.py [--nets packed plain-28 volume] [--batch 96] [--rounds 9] [--threads 1]

Every variant does a whole step on the same rows: forward, backward, clip, noise, Adam. Variants take turns within a round; a ratio is the
median over rounds of the time divided by that of the plain step of the same round. Peak memory is that of a fresh process for each
variant, above what it held before the step. Results go to results.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from dpsynth.artifacts import read_json, write_json
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream, fresh_key
from dpsynth.train.dpsgd import private_mean, write_gradient
from dpsynth.train.gradients import PatientGradients, clipped_sum

HERE = Path(__file__).resolve().parent
CLIP, CHUNK, RATE = 1.0, 48, 1e-4
NETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # input (channels, *space), channels of the levels
    "packed": ((8, 14, 14), (32, 64)),  # what the recipe trains at 28 px: space-to-depth, image and residual
    "plain-28": ((1, 28, 28), (32, 64, 64)),  # 1.1 million weights, attention at 7 x 7
    "volume": ((16, 14, 14, 14), (16, 32)),  # the recipe at 28^3
}
Step = Callable[[], None]


class Rows:
    """A net and the rows of a batch."""

    def __init__(self, name: str, batch: int) -> None:
        shape, channels = NETS[name]
        torch.manual_seed(0)
        self.net = DiffusionModelUNet(
            spatial_dims=len(shape) - 1, in_channels=shape[0], out_channels=max(1, shape[0] // 2), num_res_blocks=1, channels=channels,
            attention_levels=(*(False for _ in channels[:-1]), True), norm_num_groups=16, num_head_channels=32, num_class_embeds=2,
        )  # fmt: skip
        with torch.no_grad():  # MONAI starts some layers at zero
            for parameter in self.net.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        self.batch = batch
        self.x, self.times, self.labels = torch.randn(batch, *shape), torch.rand(batch) * 1000, torch.arange(batch) % 2

    def losses(self, net: nn.Module, part: slice, *, bfloat16: bool = False) -> Tensor:
        """Squared error of each row."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = net(self.x[part], self.times[part], class_labels=self.labels[part])
        errors: Tensor = out.float() - self.x[part, : out.shape[1]]
        return errors.square().flatten(1).mean(1)


def plain(rows: Rows, *, bfloat16: bool = False) -> Step:
    """No privacy."""
    net = copy.deepcopy(rows.net)
    optimizer = torch.optim.Adam(net.parameters(), RATE)

    def step() -> None:
        rows.losses(net, slice(None), bfloat16=bfloat16).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(rows: Rows, *, bfloat16: bool = False, chunk: int = CHUNK, draws: int = 1) -> Step:
    """The product's step: chunks, per-patient clip, ChaCha20 noise."""
    net = copy.deepcopy(rows.net)
    gradients = PatientGradients(net, rows_per_patient=draws)
    optimizer = torch.optim.Adam(gradients.parameters, RATE)
    patients = rows.batch // draws
    mechanism = PoissonDpSgd(noise_multiplier=1.0, clip_norm=CLIP, sampling_probability=0.1, steps=10, declared_patients=10 * patients)
    stream = NoiseStream(key=fresh_key())

    def step() -> None:
        total = torch.zeros(sum(parameter.numel() for parameter in gradients.parameters))
        for start in range(0, rows.batch, chunk):
            losses = partial(rows.losses, net, slice(start, start + chunk), bfloat16=bfloat16)
            clipped, _ = clipped_sum(gradients.per_patient(losses), clip_norm=CLIP)
            total += clipped
        write_gradient(gradients.parameters, private_mean(total, mechanism=mechanism, stream=stream, step=0))
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus(rows: Rows, mode: str) -> Step:
    """Opacus 1.6 with its own optimiser; its noise is torch's."""
    ghost = mode == "ghost"
    net = prepare_module(copy.deepcopy(rows.net), mode, loss_reduction="mean", **({"max_grad_norm": CLIP} if ghost else {}))
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    inner = torch.optim.Adam(net.parameters(), RATE)
    optimizer = kind(inner, noise_multiplier=1.0, max_grad_norm=CLIP, expected_batch_size=rows.batch)

    def step() -> None:
        losses = rows.losses(net, slice(None))
        (DPTensorFastGradientClipping(net, optimizer, losses, "mean") if ghost else losses.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def only_noise(rows: Rows) -> Step:
    """The ChaCha20 noise of a step, alone."""
    stream, length = NoiseStream(key=fresh_key()), sum(parameter.numel() for parameter in rows.net.parameters())

    def step() -> None:
        stream.normal("gradient", 0, length)

    return step


VARIANTS: dict[str, Callable[[Rows], Step]] = {
    "plain": plain,
    "plain, bfloat16": lambda rows: plain(rows, bfloat16=True),
    "ours": ours,
    "ours, 2 rows a patient": lambda rows: ours(rows, draws=2),
    "ours, bfloat16": lambda rows: ours(rows, bfloat16=True),
    "Opacus hooks": lambda rows: opacus(rows, "hooks"),
    "Opacus ghost": lambda rows: opacus(rows, "ghost"),
    "Opacus functorch": lambda rows: opacus(rows, "functorch"),
    "noise alone": only_noise,
}


def timed(name: str, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and ratio to the plain step of the same round, of every variant."""
    rows = Rows(name, batch)
    steps = {variant: make(rows) for variant, make in VARIANTS.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: _summary(taken, seconds["plain"]) for variant, taken in seconds.items()}


def _summary(taken: list[float], plain: list[float]) -> dict[str, float]:
    ratios = sorted(own / base for own, base in zip(taken, plain, strict=True))
    return {
        "ms": statistics.median(taken) * 1000,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 10],
        "ratio_high": ratios[-1 - len(ratios) // 10],
    }


def peak_megabytes(name: str, batch: int, variant: str) -> float:
    """Of two steps in this process, above what it held before."""
    step = VARIANTS[variant](Rows(name, batch))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew at what is held now
    before = _resident("VmHWM")
    step()
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """Kilobytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(field))
    return int(line.split()[1])


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| net, batch, threads | variant | ms | times the plain step (10th to 90th percentile of rounds) | peak MB |",
        "|---|---|---|---|---|",
    ]
    for case, variants in results.items():
        for variant in (name for name in VARIANTS if name in variants):
            found = variants[variant]
            spread = f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
            lines.append(f"| {case} | {variant} | {found['ms']:.0f} | {spread} | {found['peak_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Time all variants of every net, then their memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="opacus|torch")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_megabytes(arguments.nets[0], arguments.batch, arguments.peak))
        return
    path = HERE / "results.json"
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    if not arguments.table:
        for name in arguments.nets:
            found = timed(name, arguments.batch, arguments.rounds)
            for variant in found:
                command = [
                    sys.executable,
                    __file__,
                    "--nets",
                    name,
                    "--batch",
                    str(arguments.batch),
                    "--threads",
                    str(arguments.threads),
                    "--peak",
                    variant,
                ]
                found[variant]["peak_mb"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            results[f"{name}, {arguments.batch}, {arguments.threads}"] = found
            write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
