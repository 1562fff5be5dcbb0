"""What is measured of the machine: memory that grows, loader processes, GPUs sampled beside the training."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading

import pytest
import torch

from scaler.machine import MachineMeter, memory_gib

CPU = torch.device("cpu")


def touched(num_bytes: int) -> mmap.mmap:
    """New pages of the system, all of them in use: an allocator might give what it has kept of an earlier test."""
    pages = mmap.mmap(-1, num_bytes)
    pages.write(b"1" * num_bytes)
    return pages


def test_memory_follows_allocations() -> None:
    before = memory_gib("cpu")
    with touched(2**28):  # a quarter of a GiB
        assert 0.2 < memory_gib(CPU) - before < 0.35


def test_growth_counts_from_the_tenth_reading() -> None:
    meter = MachineMeter(CPU)
    rows = [meter.read() for _ in range(10)]
    assert ["memory_growth_gib" in row for row in rows] == [False] * 9 + [True]
    with touched(2**27):  # an eighth of a GiB
        assert meter.read()["memory_growth_gib"] == pytest.approx(1 / 8, abs=0.03)
    assert "gpu_utilization" not in rows[0] and meter.problem is None


def test_host_memory_counts_child_processes() -> None:
    meter = MachineMeter(CPU, interval=0.0)
    before = meter.read()["host_memory_gib"]
    code = "block = bytearray(2**28); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.24 < meter.read()["host_memory_gib"] - before < 0.5
        child.communicate(b"\n")


def test_utilization_is_the_mean_over_gpus_and_samples() -> None:
    taken = threading.Semaphore(0)
    values = iter([10.0, 30.0, 50.0, 70.0, 90.0, 100.0])

    def sample(gpu: int) -> float:
        value = next(values, None)
        if value is None:
            taken.release()
            raise RuntimeError("the driver went away")
        return value

    meter = MachineMeter(CPU, num_gpus=2, utilization=sample, interval=0.01)
    assert taken.acquire(timeout=30)
    assert meter.read()["gpu_utilization"] == pytest.approx((10 + 30 + 50 + 70 + 90 + 100) / 600)
    assert "gpu_utilization" not in meter.read()
    meter.close()
    meter.close()
    assert meter.problem == "RuntimeError: the driver went away"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_real_gpu_is_seen() -> None:
    meter = MachineMeter(torch.device("cuda", 0))
    assert meter.problem is None and 0 <= meter.read()["gpu_utilization"] <= 1
    meter.close()
