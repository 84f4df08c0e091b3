"""The product's command line as experiments call it, and what a verb cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dpsynth.config import Config
from dpsynth.data.cohort import Float32
from dpsynth.data.halve import halved
from dpsynth.model.moments import public_reference
from dpsynth.progress import silent
from dpsynth.train.pretrain import pretrained_weights
from dpsynth.train.pretrain_enlarger import pretrained_enlargers


@dataclass(frozen=True, kw_only=True)
class Ran:
    """output: of both streams; cpu, wall: seconds."""

    output: str
    cpu: float
    wall: float

    def cost(self) -> dict[str, float]:
        """All but the output."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


def dpsynth(home: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> Ran:
    """Run a verb in `home`; another exit status than the allowed ones ends the experiment with the verb's own words."""
    start, log = time.monotonic(), home / ".verb.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "dpsynth.cli", *arguments], cwd=home, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text()
    log.unlink()
    if process.returncode not in allowed:
        sys.exit(f"dpsynth {' '.join(arguments)}: {output}")
    return Ran(output=output, cpu=usage.ru_utime + usage.ru_stime, wall=time.monotonic() - start)


def train_and_generate(home: Path, *, epsilon: float, delta: float) -> tuple[Ran, Ran]:
    """From config.yaml in `home` to candidates in its folder run, with a ledger of this budget: what training and drawing cost."""
    if not (home / "ledger.jsonl").exists():
        dpsynth(home, "ledger", "open", "config.yaml", "--epsilon", f"{epsilon:g}", "--delta", f"{delta:g}", "--ledger", "ledger.jsonl")
    return dpsynth(home, "train", "config.yaml", "--run", "run", "--ledger", "ledger.jsonl"), dpsynth(home, "generate", "run")


def pretrain_into_cache(config: Config, public: Float32) -> None:
    """So that the time of pre-training is not counted as private training."""
    coarse = halved(public, config.halvings)
    reference = public_reference(coarse, low_frequencies=config.moments.low_frequencies)
    pretrained_weights(config, coarse, reference, progress=silent)
    pretrained_enlargers(config, public, progress=silent)
