"""What is made beside: in order, once where it is used twice in a row, and let go of in time."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch

from scaler.beside import Beside
from scaler.methods.base import Batch


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_each_is_made_in_order_and_neighbours_once(device: str) -> None:
    sources = [{"x": torch.full((3,), float(i), device=device)} for i in range(3)]
    made: list[float] = []

    def make(source: Batch) -> Batch:
        made.append(0.0)
        return {"y": 2 * source["x"]}

    beside = Beside(torch.device(device))
    for order in ([0], [0, 0], [0, 1, 2], [0, 1, 2, 0, 1, 2]):
        made.clear()
        assert [batch["y"].tolist() for batch in beside.each(make, sources, order=order)] == [
            [2.0 * i] * 3 for i in order
        ]
        assert len(made) == len(order) - sum(a == b for a, b in pairwise(order))


def test_on_a_cpu_one_is_alive_at_a_time_and_none_after_closing() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make(source: Batch) -> Batch:
        assert all(ref() is None for ref in alive)
        y = source["x"] + 1
        alive.append(weakref.ref(y))
        return {"y": y}

    batches = Beside(torch.device("cpu")).each(make, [{"x": torch.zeros(2)}] * 3, order=[0, 1, 2])
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(alive) == 3 and all(ref() is None for ref in alive)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_next_while_it_is_busy() -> None:
    """The side stream has made the second batch before the long work on the first is over."""
    device = torch.device("cuda", 0)
    ready = torch.cuda.Event()
    sources = [{"x": torch.ones(1024, device=device), "ready": ready} for _ in range(2)]
    ready.record()
    done: list[torch.cuda.Event] = []

    def make(source: Batch) -> Batch:
        y = source["x"] * 3
        done.append(torch.cuda.Event())
        done[-1].record()
        return {"y": y}

    torch.cuda.synchronize()
    batches = Beside(device).each(make, sources, order=[0, 1])
    first = next(batches)
    torch.cuda._sleep(1_000_000_000)  # half a second of the current stream
    done[1].synchronize()
    assert not torch.cuda.current_stream().query()
    assert torch.equal(next(batches)["y"], first["y"])
