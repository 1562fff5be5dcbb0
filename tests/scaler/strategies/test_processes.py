"""Processes find each other under a name of their own, whatever earlier starts have left in the store."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from typing import Any

import pytest
import torch.distributed as dist

from scaler.strategies.processes import dismiss, join, meet, wait_for_end
from tests.long import only_long


@pytest.fixture
def store() -> dist.TCPStore:
    """The launcher's, which outlives the processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def take_part(rank: int, size: int, ranks: int, port: int, late: float, answers: Any) -> None:
    """Meet, train (a sum) or idle, and tell what came of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    time.sleep(late)
    said: list[str] = []
    meeting = meet(say=said.append)
    if rank >= ranks:
        answers.put((rank, said, wait_for_end(meeting, tick=lambda: None)))
        return
    world, _ = join(meeting, ranks=ranks)
    total = world.gather_objects(rank)
    answers.put((rank, said, total))
    dismiss(meeting, ranks=ranks, reason="done")
    dist.destroy_process_group()


def start(size: int, port: int, *, ranks: int, late: dict[int, float]) -> dict[int, tuple[list[str], Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scaler.strategies.processes"])
    answers = context.Queue()
    processes = [
        context.Process(target=take_part, args=(rank, size, ranks, port, late.get(rank, 0.0), answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = {rank: (said, answer) for rank, said, answer in (answers.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return found


@pytest.mark.parametrize("late", [pytest.param({}, marks=only_long), {0: 1.0}, pytest.param({1: 1.0}, marks=only_long)])
def test_several_starts_in_one_store(store, late):
    """The second start finds the words of the first, and those of a third that died while it met."""
    for attempt in range(2):
        for rank in (0, 1, 2):
            store.set(f"hello/{rank}", f"the dead {attempt}")
        found = start(3, store.port, ranks=3, late=late)
        assert [answer for _, answer in found.values()] == [[0, 1, 2]] * 3
    if 1 in late:
        assert any(re.fullmatch(r"waiting for ranks? 1(, 2)? of 3", line) for line in found[0][0]), found[0][0]
    if 0 in late:
        assert found[2][0][-1] == "waiting for rank 0"


def test_who_does_not_train_hears_of_the_end(store):
    found = start(3, store.port, ranks=2, late={})
    assert {rank: answer for rank, (_, answer) in found.items()} == {0: [0, 1], 1: [0, 1], 2: "done"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
            "MASTER_PORT is 0",
        ),
    ],
)
def test_an_incomplete_environment_is_refused(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        meet()
