"""Random numbers that are a pure function of their keys.

Every draw of the toolkit is keyed by what it is for (seed, epoch, sample, view, …) instead of by how many draws came
before it, so that worker counts, rank layouts and restarts cannot change it. Two tools:

* `keyed_uniform` hashes integer keys with SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014): vectorised over
  samples, a few nanoseconds a number.
* `keyed_permutation` sorts raw Philox words (Salmon et al., SC 2011): numpy guarantees that bit stream across
  versions, which it does not for `Generator.permutation`.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Key = int | str | NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_words(key: Key) -> NDArray[np.uint64]:
    if isinstance(key, str):
        return np.asarray(zlib.crc32(key.encode()), dtype=np.uint64)
    return np.asarray(key, dtype=np.int64).astype(np.uint64)


def keyed_bits(*keys: Key) -> NDArray[np.uint64]:
    """Hash keys (ints, strings naming a purpose, or integer arrays that broadcast together) to uniform 64-bit words."""
    state = np.asarray(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix((state ^ _mix(_as_words(key) + _GOLDEN)) + _GOLDEN)
    return state


def keyed_uniform(*keys: Key, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for every element of the broadcast keys; shape [*broadcast, count]."""
    state = keyed_bits(*keys)
    with np.errstate(over="ignore"):
        words = _mix(state[..., None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(size: int, *keys: Key) -> NDArray[np.int64]:
    """A permutation of range(size), int64 [size], that depends on the (scalar) keys alone.

    The low bits of each word are replaced by its position: no two words are equal, so that any sort gives the same
    result, and a plain sort, several times faster than a stable argsort, is enough.
    """
    words = np.random.Philox(key=int(keyed_bits(*keys))).random_raw(size)
    mask = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    return (np.sort((words & ~mask) | np.arange(size, dtype=np.uint64)) & mask).astype(np.int64)
