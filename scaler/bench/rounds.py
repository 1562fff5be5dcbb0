"""Times contenders in turn, so that all of them see the same drift of the machine.

rounds = interleave({"a": step_of_a, "b": step_of_b}, seconds=1.0, rounds=5)
rate(rounds["a"], "cpu"), ratio(rounds["a"], rounds["b"], "cpu")
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Block:
    """What one contender did in one round: `count` things in so many seconds, of the whole process and its children."""

    count: int
    cpu: float
    wall: float


def interleave(
    steps: Mapping[str, Callable[[], int]],
    *,
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
    after: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Block]]:
    """Each contender in turn for at least `seconds`, `rounds` times; a step does some work and says how much.

    `after` each turn is not timed.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in steps}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, step in steps.items():
            blocks[name].append(_block(step, seconds))
            after(name)
    return blocks


def _block(step: Callable[[], int], seconds: float) -> Block:
    count, cpu, began = 0, cpu_seconds(), time.perf_counter()
    while True:
        count += step()
        wall = time.perf_counter() - began
        if wall >= seconds:
            return Block(count, cpu_seconds() - cpu, wall)


def cpu_seconds() -> float:
    """Of all threads of this process and of its children, those that have ended (and were waited for) included."""
    own = psutil.Process()
    times = [own.cpu_times()]
    total = time.process_time() + times[0].children_user + times[0].children_system
    for child in own.children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def rate(blocks: Sequence[Block], clock: Clock) -> float:
    """Things per second, the median over rounds."""
    return statistics.median(b.count / max(getattr(b, clock), 1e-9) for b in blocks)


def ratio(blocks: Sequence[Block], others: Sequence[Block], clock: Clock) -> float:
    """How many times the others' rate, the median of the rounds' own ratios."""
    return statistics.median(
        rate([mine], clock) / rate([theirs], clock) for mine, theirs in zip(blocks, others, strict=True)
    )
