"""Each party of a real federation is killed at each stage of a study: the study ends with the weights of an undisturbed one, bit by bit,
and every site's ledger charges every round once.

DPSYNTH_FLOWER=flower/bin pytest -m slow tests/attacks/test_deployed_faults.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fault_cases import SITES, Parties, require_right, require_same, simulated_weights
from flower_cases import DEPLOYED, PROGRAMS

from federated.launch import Flower

pytestmark = DEPLOYED
STUDY_SECONDS = 500
SITE = SITES[0]
VICTIMS = {  # by name: whose processes, and words in the command line of the one that is killed
    "client app": (f"node-{SITE}", "flwr-clientapp"),
    "node": (f"node-{SITE}", "flower-supernode"),
    "guard": (f"guard-{SITE}", ""),
    "superlink": ("up", "flower-superlink"),
    "server app": ("up", "flwr-serverapp"),
    "superexec": ("up", "flower-superexec"),
    "up": ("up", ""),
    "coordinator": ("study", ""),
}
STAGES = ("0 charged", "2 answered", "4 trained 6", "5 answered", "6 asked")  # a checkpoint is written after step 5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    """Folders of all parties; nobody runs."""
    parties = Parties(folder=tmp_path_factory.mktemp("p", numbered=True), flower=Flower(PROGRAMS))
    parties.write()
    return parties


@pytest.fixture(scope="module")
def undisturbed(written: Parties) -> dict[str, np.ndarray]:
    return simulated_weights(written)


@pytest.fixture(scope="module")
def parties(written: Parties, undisturbed: dict[str, np.ndarray]) -> Iterator[Parties]:
    """All of them running, after the undisturbed study in copies of their folders."""
    del undisturbed
    try:
        written.start()
        yield written
    finally:
        written.close()


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_study_goes_on_when_a_party_is_killed_in_every_round(parties: Parties, undisturbed: dict[str, np.ndarray], victim: str) -> None:
    name, (party, words) = victim.replace(" ", "-"), VICTIMS[victim]
    parties.stop_at(SITE, STAGES[0])
    study = parties.begin(name)
    for following in (*STAGES[1:], ""):
        parties.wait_stopped(SITE)
        if following:
            parties.stop_at(SITE, following)
        (study if party == "study" else parties.kept[party]).kill(words)
        parties.go_on(SITE)
    study.wait(STUDY_SECONDS)
    require_right(parties, name)
    require_same(parties, name, undisturbed)
