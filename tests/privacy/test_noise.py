"""The stream of random numbers: right distribution, replayable, independent; wrong scales are rejected by the same tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpsynth.privacy.noise import NoiseStream, fresh_key

KEY = bytes(range(32))
FALSE_ALARM = 1e-6  # of each statistical test here; the key is fixed, so they are repeatable


def test_equal_addresses_give_equal_numbers_and_others_do_not() -> None:
    stream = NoiseStream(key=KEY)
    first = stream.normal("gradient", 3, 1000)
    assert np.array_equal(first, NoiseStream(key=KEY).normal("gradient", 3, 1000))
    others = [
        stream.normal("gradient", 4, 1000),
        stream.normal("gradients", 3, 1000),
        NoiseStream(key=bytes(32)).normal("gradient", 3, 1000),
        stream.normal("1:gradient", 3, 1000),
    ]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(1000)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    stream = NoiseStream(key=KEY)
    assert np.array_equal(stream.uniform("x", 0, 10), stream.uniform("x", 0, 1000)[:10])


def test_normal_numbers_are_standard_normal() -> None:
    numbers = NoiseStream(key=KEY).normal("test", 0, 200_000)
    assert stats.kstest(numbers, "norm").pvalue > FALSE_ALARM
    assert chi_square_p(numbers) > FALSE_ALARM
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_scale_that_is_off_by_three_percent_is_rejected(factor: float) -> None:
    assert chi_square_p(factor * NoiseStream(key=KEY).normal("test", 0, 200_000)) < FALSE_ALARM


def chi_square_p(numbers: np.ndarray) -> float:
    energy = float(np.sum(numbers**2))
    return float(2 * min(stats.chi2.cdf(energy, len(numbers)), stats.chi2.sf(energy, len(numbers))))


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    numbers = NoiseStream(key=KEY).uniform("test", 0, 200_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(numbers**1.02, "uniform").pvalue < FALSE_ALARM


def test_extreme_bits_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (0, 2**64 - 1):
        monkeypatch.setattr(NoiseStream, "integers", lambda *_, value=value: np.array([value], dtype=np.uint64))
        assert np.isfinite(NoiseStream(key=KEY).normal("x", 0, 1)).all()


def test_every_byte_of_the_key_counts() -> None:
    first = NoiseStream(key=KEY).integers("x", 0, 4).tobytes()
    for position in range(32):
        changed = bytearray(KEY)
        changed[position] ^= 1
        assert NoiseStream(key=bytes(changed)).integers("x", 0, 4).tobytes() != first


def test_the_key_is_what_the_operating_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(count)))
    assert fresh_key() == bytes(range(32))


def test_keys_are_fresh_and_must_be_long_enough() -> None:
    assert fresh_key() != fresh_key()
    assert len(fresh_key()) == 32
    with pytest.raises(ValueError, match="32 bytes"):
        NoiseStream(key=b"short")
