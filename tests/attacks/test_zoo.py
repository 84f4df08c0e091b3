"""Every case of the zoo is caught by the check that is named, and no honest twin is accused more often than by chance.

    pytest -m slow tests/attacks/test_zoo.py                 # twenty hospitals a case, about 50 minutes on one core

By default one hospital for what no other default test plants through the real encoder, classifier and filters.
"""

from __future__ import annotations

import pytest
from zoo_cases import FAMILIES, HONEST_TWIN, counts

OFTEN = 0.9  # of the hospitals: a case that is seen less often is no case of the table
BY_DEFAULT = ("modes", "sampler", "diffusion")


@pytest.mark.parametrize("family", BY_DEFAULT)
def test_a_case_is_caught_by_name_and_its_twin_is_left_alone(family: str) -> None:
    found = FAMILIES[family].judge(1)
    assert set(found) == {*FAMILIES[family].cases, *FAMILIES[family].twins()}
    for name, finding in found.items():
        assert finding.caught is not name.startswith(HONEST_TWIN), f"{name}: {finding.said}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_hospitals(family: str) -> None:
    """A twin may be accused at three of twenty: at 5 %, four happen once in 60."""
    number = FAMILIES[family].repetitions
    found = counts(family, range(10, 10 + number))
    assert {name: times for name, times in found.items() if not name.startswith(HONEST_TWIN) and times < OFTEN * number} == {}
    assert {name: times for name, times in found.items() if name.startswith(HONEST_TWIN) and times > 0.15 * number} == {}
