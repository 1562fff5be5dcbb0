"""Timing in turn: whose work is counted, and the arithmetic."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from scaler.bench.rounds import Block, cpu_seconds, interleave, rate, ratio

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"


def test_contenders_take_turns_for_their_time() -> None:
    calls = []

    def step(name: str, pause: float) -> int:
        calls.append(name)
        time.sleep(pause)
        return 7

    blocks = interleave(
        {"a": lambda: step("a", 0.02), "b": lambda: step("b", 0.05)}, seconds=0.04, rounds=2, say=calls.append
    )
    assert calls == ["round 1 of 2", "a", "a", "b", "round 2 of 2", "a", "a", "b"]
    assert [[block.count for block in blocks[name]] for name in "ab"] == [[14, 14], [7, 7]]
    assert all(block.wall >= 0.04 and block.cpu < block.wall for block in blocks["a"])


def test_rates_are_medians_and_ratios_those_of_each_round() -> None:
    mine = [Block(10, cpu=1.0, wall=2.0), Block(10, cpu=2.0, wall=2.0), Block(10, cpu=5.0, wall=5.0)]
    theirs = [Block(5, cpu=1.0, wall=1.0), Block(5, cpu=5.0, wall=5.0), Block(1, cpu=1.0, wall=1.0)]
    assert (rate(mine, "cpu"), rate(mine, "wall")) == (5.0, 5.0)
    assert ratio(mine, theirs, "cpu") == pytest.approx(2.0)  # of 2, 5 and 2


def test_time_of_children_counts_while_they_run_and_after() -> None:
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    running = cpu_seconds() - before
    child.communicate(b"\n")
    assert running >= 0.28 and cpu_seconds() - before >= running - 0.03
