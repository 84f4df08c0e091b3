"""What the user that Flower runs under can read of a guard that runs under another."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_cases import Site, World, new_site

NOBODY = 65534
CAT = "/bin/cat"


@pytest.fixture
def open_site(world: World) -> Iterator[Site]:
    """A site whose folder everybody may enter, so that only the files' own rights stand between."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        public_key = (world.sites["a"].folder / "coordinator" / "signing.pub").read_bytes()
        yield new_site(folder / "a", name="a", seed=0, public_key=public_key)
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reads_neither_ledger_nor_keys_nor_answers(world: World, open_site: Site) -> None:
    open_site.guard.handle(world.request())
    for path in (*open_site.folder.rglob("*"), open_site.folder):
        if path.is_dir() and path != open_site.policy.state:
            path.chmod(0o755)  # the worst that a careless administrator does to the folders around
    private = [open_site.policy.ledger, *(path for path in open_site.policy.state.rglob("*") if path.is_file())]
    assert len(private) > 4

    def attempt(path: Path) -> str:
        command = [CAT, str(path)]
        done = subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True, check=False)
        return "read" if done.returncode == 0 else "refused"

    assert attempt(open_site.folder / "coordinator" / "signing.pub") == "read", "the attempt itself must be able to succeed"
    assert {path.name: attempt(path) for path in private} == {path.name: "refused" for path in private}
