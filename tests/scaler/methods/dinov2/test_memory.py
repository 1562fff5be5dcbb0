"""What a step holds does not grow with the number of micro-batches, but for the teacher's bottlenecks."""

from __future__ import annotations

import gc

import torch

from tests.live_bytes import LiveBytes
from tests.scaler.methods.dinov2.test_method import HYPER
from tests.scaler.methods.dinov2.tiny import loader_batch, tiny_method


def test_live_bytes_are_those_of_live_tensors() -> None:
    old = torch.zeros(1000)
    with LiveBytes() as memory:
        a = old.add(1.0).add_(1.0).view(10, 100)  # one new tensor; in place and views are none
        assert memory.live == memory.peak == 4000
        b = a * 2
        del a
        b = b.double()
    assert (memory.live, memory.peak) == (8000, 12000)
    del b
    assert memory.live == 0


def observing(num_micro_batches: int) -> tuple[int, int]:
    """Peak bytes of the observing passes and of combining what they saw, and the bytes that they keep for later."""
    torch.manual_seed(0)
    method = tiny_method(embed_dim=96, group_size=16, num_prototypes=3000)
    method.tile_elements = 1 << 17
    size = 16 * num_micro_batches
    raw = [loader_batch(method, rows=slice(i, i + 16), size=size) for i in range(0, size, 16)]
    gc.collect()
    with LiveBytes() as memory, torch.no_grad():
        observations = [method("observe", method.augment(batch, seed=0, step=3), HYPER) for batch in raw]
        kept = sum(x.nbytes for o in observations for x in (o.cls, o.patches))
        method("combine", observations, HYPER)
    return memory.peak, kept


def test_observing_is_flat_in_the_number_of_micro_batches() -> None:
    peaks = {count: observing(count) for count in (1, 2, 4, 8)}
    one, kept_of_one = peaks[1]
    for count, (peak, kept) in peaks.items():
        assert kept < 1.3 * count * kept_of_one, "a bottleneck for each class token and each masked patch"
        assert peak - kept < 1.02 * one, "beside them, one micro-batch is in memory at a time"
    scores = 8 * 32 * 3000 * 4  # of all class tokens
    assert peaks[8][0] < 1.1 * one < one + scores
