"""Random numbers as a pure function of integers: nothing to seed, to save or to restore.

SplitMix64 (Steele, Lea & Flood 2014) as a hash: the same key gives the same number on every rank,
worker, machine and version of any library.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(*parts: int) -> int:
    """One 64-bit hash of several integers; the order of the parts counts."""
    state = 0
    for part in parts:
        state = _finalized((state ^ (part & _MASK)) + _GAMMA)
    return state


def signed(bits: int) -> int:
    """The same 64 bits as int64, for tensors."""
    return bits - 2**64 if bits >= 2**63 else bits


def uniforms(key: int) -> Iterator[float]:
    """Endless uniform numbers in [0, 1) for one key."""
    counter = key
    while True:
        counter = (counter + _GAMMA) & _MASK
        yield (_finalized(counter) >> 11) * 2.0**-53


def permutation(count: int, key: int) -> NDArray[np.int64]:
    """A permutation of range(count): its numbers sorted by their hash; ties keep their order."""
    bits = np.arange(count, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(key)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MIX1)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MIX2)
    return np.argsort(bits ^ (bits >> np.uint64(31)), kind="stable")


def _finalized(bits: int) -> int:
    bits &= _MASK
    bits = ((bits ^ (bits >> 30)) * _MIX1) & _MASK
    bits = ((bits ^ (bits >> 27)) * _MIX2) & _MASK
    return bits ^ (bits >> 31)
