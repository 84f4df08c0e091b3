"""The product's command line as experiments call it, and what a verb cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path


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
