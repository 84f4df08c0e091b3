"""Every random number that the guarantee rests on: a ChaCha20 stream, keyed per run, addressed by purpose and step.

Because the numbers of a step are a function of (key, purpose, step), a run that was killed repeats its lost steps exactly: it releases
nothing that it had not released before, so resuming costs no privacy. The key comes from the operating system and is destroyed when
the reservation is settled. Moments and independence are tested; attacks on the low-order bits of floating-point noise
(Mironov 2012) are not excluded.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.special import ndtri

KEY_BYTES = 32


def fresh_key() -> bytes:
    """32 bytes from the operating system."""
    return os.urandom(KEY_BYTES)


class NoiseStream:
    """Uniform and normal numbers of one run."""

    def __init__(self, *, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
        self._key = key

    def integers(self, purpose: str, step: int, size: int) -> NDArray[np.uint64]:
        """Uniform 64-bit integers, (size,)."""
        return np.frombuffer(self._bytes(purpose, step, 8 * size), dtype="<u8")

    def uniform(self, purpose: str, step: int, size: int) -> NDArray[np.float64]:
        """Uniform on [0, 1) with 53 bits, (size,)."""
        return np.asarray((self.integers(purpose, step, size) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def normal(self, purpose: str, step: int, size: int) -> NDArray[np.float64]:
        """Standard normal by the inverse distribution function, (size,).

        52 bits and half a step: the largest argument is 1 - 2^-53, the last number below 1, so no result is infinite.
        """
        inside = (self.integers(purpose, step, size) >> np.uint64(12)) * 2.0**-52 + 2.0**-53
        return np.asarray(ndtri(inside), dtype=np.float64)

    def _bytes(self, purpose: str, step: int, count: int) -> bytes:
        # One cipher key per (purpose, step): the 128-bit nonce field then starts at zero and its counter cannot run into another stream.
        label = f"{len(purpose)}:{purpose}:{step}".encode()
        derived = hashlib.blake2b(label, key=self._key, digest_size=32, person=b"dpsynth noise").digest()
        return Cipher(algorithms.ChaCha20(derived, bytes(16)), mode=None).encryptor().update(bytes(count))
