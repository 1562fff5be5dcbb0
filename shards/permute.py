"""A keyed permutation evaluated element by element: where does position k of a block go, without making the block.

A Feistel network (Luby & Rackoff, SIAM J. Comput. 1988) on the smallest power of two that holds the block, and cycle
walking (Black & Rogaway, CT-RSA 2002) for what falls outside: both are bijections whatever their round function is.
Nothing is stored, and a batch that touches 4,096 blocks costs as much as one that touches a single one — sorting random
words would have to order every one of these blocks to look at a few of its elements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.random import Key, keyed_bits

_ROUNDS = 16


def permute_within(index: ArrayLike, size: ArrayLike, *keys: Key) -> NDArray[np.int64]:
    """π(index) for the permutation π of range(size) that the keys name; int64 of the broadcast shape.

    `index`, `size` and the keys (as in `keyed_bits`) are integers or arrays that broadcast together, with
    0 <= index < size <= 2**31: every element may belong to a block of its own.

    The bits of an index, ⌈log2(size)⌉ of them, are cut into a low half of ⌊·/2⌋ and a high half. Round r xors the low
    half (r even) or the high half (r odd) with as many bits of keyed_bits(state ^ (other half + r * 2**32)), where
    state = keyed_bits(*keys). Sixteen rounds are repeated until the result is below `size`.
    """
    index, size, state = np.broadcast_arrays(
        np.asarray(index, dtype=np.int64), np.asarray(size, dtype=np.int64), keyed_bits(*keys).view(np.int64)
    )
    shape = index.shape
    values, sizes, states = index.reshape(-1), size.reshape(-1), state.reshape(-1)
    result = _rounds(values, sizes, states)
    (outside,) = np.nonzero(result >= sizes)
    while len(outside):
        result[outside] = _rounds(result[outside], sizes[outside], states[outside])
        outside = outside[result[outside] >= sizes[outside]]
    return result.reshape(shape)


def _rounds(index: NDArray[np.int64], size: NDArray[np.int64], state: NDArray[np.int64]) -> NDArray[np.int64]:
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.int64)  # of size - 1: exact below 2**53
    low_bits = bits >> 1
    low_mask = (np.int64(1) << low_bits) - 1
    high_mask = (np.int64(1) << (bits - low_bits)) - 1
    low, high = index & low_mask, index >> low_bits
    for r in range(_ROUNDS):
        if r % 2 == 0:
            low = low ^ (keyed_bits(state ^ (high + (r << 32))).view(np.int64) & low_mask)
        else:
            high = high ^ (keyed_bits(state ^ (low + (r << 32))).view(np.int64) & high_mask)
    return low | high << low_bits
