"""Experiments are scripts, no package: their folders are put on the path as running a script does."""

from __future__ import annotations

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "baselines"), str(EXPERIMENTS / "005-planning-curves"), str(EXPERIMENTS / "012-sites")]
