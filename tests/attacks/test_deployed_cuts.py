"""A hospital whose disk is full, and one that is cut off the network, in a real federation: the study waits or is run again, ends with the
weights of an undisturbed one, bit by bit, and every round is charged once. Needs root, for a small file system and a network namespace.

DPSYNTH_FLOWER=flower/bin pytest -m slow tests/attacks/test_deployed_cuts.py
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_cases import SITES, Parties, require_right, require_same, simulated_weights
from flower_cases import DEPLOYED, PROGRAMS

from federated.launch import Flower

TOOLS = all(shutil.which(name) for name in ("ip", "mount", "umount"))
pytestmark = [
    *DEPLOYED,
    pytest.mark.skipif(os.geteuid() != 0 or not TOOLS, reason="only root makes file systems and network namespaces"),
]
STUDY_SECONDS = 600
SITE = SITES[0]
HERE, THERE = "10.203.17.1", "10.203.17.2"


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)


class Link:
    """The only way between a namespace, where a hospital's node lives, and the coordinator."""

    def __init__(self) -> None:
        self.space, self.ours, self.theirs = (f"dps{os.getpid() % 10_000}{end}" for end in ("n", "a", "b"))

    def make(self) -> None:
        command("ip", "netns", "add", self.space)
        command("ip", "link", "add", self.ours, "type", "veth", "peer", "name", self.theirs, "netns", self.space)
        command("ip", "address", "add", f"{HERE}/30", "dev", self.ours)
        command("ip", "link", "set", self.ours, "up")
        command("ip", "-n", self.space, "address", "add", f"{THERE}/30", "dev", self.theirs)
        for device in (self.theirs, "lo"):
            command("ip", "-n", self.space, "link", "set", device, "up")

    def cut(self) -> None:
        """Nothing passes and nobody is told."""
        command("ip", "link", "set", self.ours, "down")

    def restore(self) -> None:
        command("ip", "link", "set", self.ours, "up")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.space], check=False, capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "del", self.ours], check=False, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    link = Link()
    try:
        link.make()
        yield link
    finally:
        link.remove()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parties]:
    """Folders of all parties; the first site's lies on a file system of 4 MB."""
    parties = Parties(folder=tmp_path_factory.mktemp("p", numbered=True), flower=Flower(PROGRAMS))
    small = parties.folder / SITE
    small.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(small))
    try:
        parties.write(hosts=("localhost", "127.0.0.1", HERE))
        yield parties
    finally:
        command("umount", "-l", str(small))


@pytest.fixture(scope="module")
def undisturbed(written: Parties) -> dict[str, np.ndarray]:
    return simulated_weights(written)


@pytest.fixture(scope="module")
def parties(written: Parties, undisturbed: dict[str, np.ndarray], link: Link) -> Iterator[Parties]:
    """All of them running, the first site's node in the namespace."""
    del undisturbed
    (written.folder / "flower-home").mkdir()  # Flower's own files are not on the guard's disk
    (written.folder / SITE / "flower-home").symlink_to(written.folder / "flower-home")
    try:
        written.start(host="0.0.0.0", address=HERE, prefix={SITE: ("ip", "netns", "exec", link.space)})
        yield written
    finally:
        written.close()


def fill(folder: Path) -> Path:
    """Take all the space there is."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    return path


def test_a_study_goes_on_when_a_full_disk_has_space_again(parties: Parties, undisturbed: dict[str, np.ndarray]) -> None:
    parties.stop_at(SITE, "0 charged")
    study = parties.begin("full")
    for following in ("4 trained 4", "5 asked", ""):
        parties.wait_stopped(SITE)
        filler = fill(parties.folder / SITE)
        parties.go_on(SITE)
        failed = parties.log(study.name).count("failed: the site failed")
        wait_for_line(parties, study.name, "failed: the site failed", failed + 1)
        assert "No space left" in parties.log(f"guard-{SITE}"), "the hospital's own log says why"
        filler.unlink()
        if following:
            parties.stop_at(SITE, following)
    study.wait(STUDY_SECONDS)
    assert "No space left" not in parties.log(study.name), "its coordinator is not told"
    require_right(parties, "full")
    require_same(parties, "full", undisturbed)


@pytest.mark.parametrize("seconds", [15, 90], ids=["shorter than a heartbeat", "longer than two"])
def test_a_study_goes_on_when_the_network_is_back(parties: Parties, undisturbed: dict[str, np.ndarray], link: Link, seconds: float) -> None:
    name = f"cut-{seconds:.0f}"
    parties.stop_at(SITE, "0 charged")
    study = parties.begin(name)
    for following in ("5 answered", ""):
        parties.wait_stopped(SITE)
        link.cut()
        parties.go_on(SITE)
        time.sleep(seconds)
        link.restore()
        if following:
            parties.stop_at(SITE, following)
    study.wait(STUDY_SECONDS)
    require_right(parties, name)
    require_same(parties, name, undisturbed)


def wait_for_line(parties: Parties, name: str, words: str, count: int) -> None:
    end = time.monotonic() + 120
    while parties.log(name).count(words) < count:
        assert time.monotonic() < end, f"{words!r} was not said"
        time.sleep(0.2)
