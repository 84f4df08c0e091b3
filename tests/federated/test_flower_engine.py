"""Many sites over Flower's own simulation engine: needs Flower with its extra, `pip install 'flwr[simulation]>=1.41,<1.42'`.

DPSYNTH_FLOWER=FOLDER/bin pytest -m slow tests/federated/test_flower_engine.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from federation_cases import Hospital, World, initial, study
from flower_cases import DEPLOYED, PROGRAMS

from federated.demonstration import free_port
from federated.flower_engine import flower_engine
from federated.launch import Flower
from federated.messages import Code, decode_reply
from federated.relay import Relay

pytestmark = [
    *DEPLOYED,
    pytest.mark.skipif(not any(PROGRAMS.parent.glob("lib/python*/site-packages/ray")), reason="Flower is there without Ray"),
]
SITES = [f"site{number}" for number in range(12)]


@contextmanager
def engine(handlers: Mapping[str, Callable[[bytes], bytes]], *, cores: int) -> Iterator[tuple[Relay, Path]]:
    """The way to these guards, and the engine's folder, whose path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name) / "engine"
        with flower_engine(folder, Flower(PROGRAMS), handlers, port=free_port(), cores=cores) as relay:
            yield relay, folder


def test_every_site_is_asked_for_itself_and_the_study_ends_as_in_one_process(empty: World, tmp_path: Path) -> None:
    """Twelve hospitals behind twelve virtual nodes, two at a time: each gets its own frames, and the weights are those of a study without
    anything between.
    """
    alone = {site: Hospital(empty, number) for number, site in enumerate(SITES)}
    expected = study(empty, alone, tmp_path / "one-process", sites=tuple(SITES)).run(initial(empty)).arrays
    hospitals = {site: Hospital(empty, number) for number, site in enumerate(SITES)}
    coordinator = study(empty, hospitals, tmp_path / "engine", sites=tuple(SITES), deadline_seconds=120.0)
    with engine(hospitals, cores=2) as (relay, _):
        coordinator.transport = relay
        found = coordinator.run(initial(empty)).arrays
    assert {site: len(hospitals[site].frames) for site in SITES} == {site: len(alone[site].frames) for site in SITES}
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def test_a_guard_that_is_gone_is_named() -> None:
    with engine({"a": bytes, "b": bytes}, cores=1) as (relay, folder):
        assert relay({"b": b"123", "a": b"4"}, deadline_seconds=120) == {"a": b"4", "b": b"123"}
        (folder / "guards" / "1.sock").unlink()
        replies = relay({"a": b"5", "b": b"6"}, deadline_seconds=120)
    assert replies["a"] == b"5"
    assert decode_reply(replies["b"], largest_bytes=1 << 20)[0].code is Code.UNREACHABLE
