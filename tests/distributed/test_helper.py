"""The helper itself: results come back by rank, and failures come back with the rank's traceback."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import Tensor

from scaler.collectives import World
from tests.distributed.helper import run_distributed


def total(world: World, factor: int) -> tuple[int, Tensor]:
    value = torch.tensor([float(world.rank * factor)], requires_grad=True)
    return world.rank, world.sum(value)


def one_raises(world: World) -> None:
    if world.rank == 1:
        raise KeyError("broken on purpose")
    world.barrier()


def one_dies(world: World) -> None:
    if world.rank == 1:
        os._exit(3)
    time.sleep(0.1)


def hangs(world: World) -> None:
    time.sleep(60)


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(total, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(value, torch.tensor([30.0])) and not value.requires_grad for _, value in results)


def test_an_exception_carries_the_ranks_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2:.*in one_raises.*KeyError: 'broken on purpose'"):
        run_distributed(one_raises, 2)


def test_a_dead_rank_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1: exit code 3|rank 0 of 2"):
        run_distributed(one_dies, 2)


def test_a_hang_is_cut() -> None:
    with pytest.raises(TimeoutError, match="did not end within 8"):
        run_distributed(hangs, 2, timeout=8.0)
