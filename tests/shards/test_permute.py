"""The element-by-element permutation: a bijection for every size, equal to its description, and well mixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.permute import permute_within
from shards.random import keyed_bits


def oracle(index: int, size: int, *keys: int | str) -> int:
    """The docstring's description with Python integers."""
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    high_bits = bits - low_bits
    state = int(keyed_bits(*keys))
    while True:
        low, high = index % 2**low_bits, index // 2**low_bits
        for r in range(16):
            other = high if r % 2 == 0 else low
            word = state ^ (other + r * 2**32)
            word = int(keyed_bits(word - 2**64 if word >= 2**63 else word))
            if r % 2 == 0:
                low ^= word % 2**low_bits
            else:
                high ^= word % 2**high_bits
        index = high * 2**low_bits + low
        if index < size:
            return index


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(0, 99))
def test_is_a_bijection(size: int, seed: int, block: int) -> None:
    image = permute_within(np.arange(size), size, "window", seed, block)
    assert image.dtype == np.int64
    assert sorted(image.tolist()) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**31), st.integers(0, 2**40), st.data())
def test_equals_its_description(size: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert int(permute_within(index, size, "window", seed)) == oracle(index, size, "window", seed)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 50)), min_size=1, max_size=30), st.randoms())
def test_every_element_may_have_its_own_block(blocks: list[tuple[int, int]], random: object) -> None:
    sizes, keys = (np.array(column) for column in zip(*blocks, strict=True))
    index = sizes // 2
    together = permute_within(index, sizes, "window", keys)
    alone = [int(permute_within(i, s, "window", k)) for i, s, k in zip(index, sizes, keys, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_permutations_of_few_are_about_equally_likely(size: int) -> None:
    num_keys = 100 * math.factorial(size)
    images = np.stack([permute_within(k, size, "window", np.arange(num_keys)) for k in range(size)], axis=1)
    _, counts = np.unique(images @ size ** np.arange(size), return_counts=True)
    degrees = math.factorial(size) - 1
    assert len(counts) == degrees + 1
    assert ((counts - 100) ** 2 / 100).sum() < degrees + 6 * (2 * degrees) ** 0.5


def test_a_window_is_well_mixed() -> None:
    """2048 samples, 400 keys: neighbours land as far apart, and keys differ as much, as in random permutations."""
    size, keys = 2048, 400
    images = permute_within(np.arange(size), size, "window", np.arange(keys)[:, None])
    fixed = (images == np.arange(size)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 5 / keys**0.5  # Poisson(1)
    for distance in (
        (images[:, 1:] - images[:, :-1]) % size,
        (images[1:] - images[:-1]) % size,
        (images - np.arange(size)) % size,
    ):
        counts = np.bincount(distance.ravel() // 32, minlength=64)
        expected = distance.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * (2 * 63) ** 0.5
