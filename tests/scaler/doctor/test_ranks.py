"""The processes of a launcher look at each other: sums, speed, clocks, and what each machine has found."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from dataclasses import asdict

import pytest
import torch

from scaler.collectives import World
from scaler.doctor import ranks
from scaler.doctor.finding import Finding
from tests.distributed.helper import run_distributed

_CLONE_NEWUTS = 0x04000000


def examined(world: World, seconds: float) -> list[Finding]:
    """What a rank finds; the second one is on a machine of another name, whose clock is off by so many seconds."""
    found = [asdict(Finding("warning", "disk", f"of rank {world.rank}"))]
    if world.rank == 1 and seconds:
        if ctypes.CDLL(None).unshare(_CLONE_NEWUTS) == 0:
            socket.sethostname("elsewhere")
        now = time.time
        time.time = lambda: now() + seconds
    return list(ranks.check({"findings": found}))


def test_two_processes_of_one_machine() -> None:
    one, other = run_distributed(examined, 2, 0)
    assert [finding.check for finding in one] == ["disk", "disk", "all-reduce", "bandwidth"]
    assert one == other and one[0].host == "" and one[1].found == "of rank 1"
    assert one[2].found == "2 processes on 1 machine add up exactly"
    assert one[3].facts["bytes_per_second"] > 1e6 and "over gloo" in one[3].found


@pytest.mark.skipif(os.geteuid() != 0, reason="a host name of its own takes root")
def test_a_clock_that_is_off_on_another_machine() -> None:
    one, other = run_distributed(examined, 2, 30.0)
    clock, here = one[-1], socket.gethostname()
    assert one[:2] == other[:2] and [finding.host for finding in one[:2]] == [here, "elsewhere"]
    assert (clock.level, clock.check) == ("error", "clock") and "chrony" in clock.fix
    assert clock.found.startswith("elsewhere's clock is +30.") and clock.found.endswith(f" s from {here}'s")


def test_wrong_sums_are_told_by_rank() -> None:
    class Broken(World):
        """A process whose adder drops a bit now and then."""

        def sum_(self, x: torch.Tensor) -> torch.Tensor:
            x[::1000] += 1
            return x

    said = ranks.sums(Broken(), torch.device("cpu"), ["node-1"])
    assert said.level == "error" and said.found == "wrong sums on rank 0 (node-1): 1049 of 1048579"
