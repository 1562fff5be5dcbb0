"""What FSDP2 gathers and when: ahead of need, not twice for the last block, and near by where it is told to."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from scaler.collectives import World
from scaler.strategies.fsdp2 import check_reshard, rows_of_blocks
from tests.distributed.helper import run_distributed
from tests.tiny import Tiny, tiny_steps, tiny_strategy

NUM_BLOCKS = 2  # of the tiny method's student, and of its teacher


class Gathers(TorchDispatchMode):
    """Counts all-gathers, and by whether they reach all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.sizes = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather_base" in str(func):
            self.count += 1
            self.sizes.add(args[0].numel() // args[1].numel())
        return func(*args, **(kwargs or {}))


def steps(world: World, runs: list[dict[str, Any]]) -> list[tuple[list[float], list[tuple[str, int]], set[int]]]:
    """Of each run: its losses, the all-gathers begun when each block computes in the last step, and their sizes."""
    found = []
    for settings in runs:
        strategy = tiny_strategy("fsdp2", world, **settings)
        losses = tiny_steps(strategy, world, first=0, count=2)
        gathers, seen = Gathers(), list[tuple[str, int]]()

        def note(name: str, gathers: Gathers = gathers, seen: list[tuple[str, int]] = seen) -> Any:
            return lambda *_: seen.append((name, gathers.count))

        for network in ("student", "teacher"):
            for i, block in enumerate(getattr(strategy.method, network).blocks):
                block.up.register_forward_pre_hook(note(f"{network} {i}"))
                if network == "student":
                    block.down.register_full_backward_pre_hook(note(f"backward {i}"))
        with gathers:
            losses += tiny_steps(strategy, world, first=2, count=1)
        found.append((losses, seen, gathers.sizes))
    return found


def test_blocks_are_gathered_ahead_and_the_last_one_once() -> None:
    runs = [{"prefetch": 0}, {"prefetch": 1}, {"prefetch": 2}, {"reshard_after_forward": 2}]
    own, ahead, further, near = run_distributed(steps, 4, runs)[0]
    for losses, _, _ in (ahead, further, near):
        assert losses == pytest.approx(own[0], rel=2e-6)
    names = ["teacher 0", "teacher 1", "student 0", "student 1", "backward 1", "backward 0"]
    assert [name for name, _ in ahead[1]] == names
    # The root unit and five blocks' worth; torch's own prefetching gathers the teacher's last block once more.
    assert [count for _, count in own[1]] == [2, 3, 4, 5, 6, 7]
    assert [count for _, count in ahead[1]] == [3, 3, 5, 5, 6, 6] == [count for _, count in further[1]]
    assert own[2] == ahead[2] == {4} and near[2] == {2, 4}, "the student's first block comes back from one neighbour"


def test_rows_are_what_runs_one_after_the_other() -> None:
    method = Tiny()
    assert rows_of_blocks(method) == [list(method.student.blocks), list(method.teacher.blocks)]


@pytest.mark.parametrize("after", [3, 4, 8])
def test_ranks_to_stay_among_are_part_of_the_group(after: int) -> None:
    with pytest.raises(ValueError, match=rf"reshard_after_forward is {after} ranks, .* of 4; valid: true, false, 2$"):
        check_reshard(after, width=4)
    assert check_reshard(2, width=4) == 2 and check_reshard(True, width=4) is True
