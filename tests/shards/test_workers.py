"""Loader processes: one thread each, signals, errors on their way back, and no orphans however the main one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from shards.workers import Batch, Failure, run_workers

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Probe(Dataset["Batch | Failure"]):
    """Tells what the process that serves a request looks like; request "bad" fails, "bug" raises."""

    def __getitem__(self, request: Any) -> Batch | Failure:
        if request == "bad":
            return Failure("shard x.tar is missing", "Traceback of the worker")
        if request == "bug":
            raise KeyError("a bug")
        return {
            "request": request,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "interrupt": signal.getsignal(signal.SIGINT),
            "user_signal": signal.getsignal(signal.SIGUSR1),
        }


def run(requests: list[Any], num_workers: int) -> list[Batch]:
    return list(run_workers(Probe(), iter(requests), num_workers=num_workers, prefetch=2, multiprocessing_context=None))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_requests(num_workers: int) -> None:
    batches = run(list(range(20)), num_workers)
    assert [batch["request"] for batch in batches] == list(range(20))
    pids = {batch["pid"] for batch in batches}
    assert pids == {os.getpid()} if num_workers == 0 else len(pids) == num_workers and os.getpid() not in pids


def test_workers_have_one_thread_and_ignore_what_is_meant_for_the_main_process() -> None:
    (batch,) = run([0], 1)
    assert batch["threads"] == 1
    assert batch["interrupt"] == batch["user_signal"] == signal.SIG_IGN


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_are_plain_errors_after_the_batches_before_them(num_workers: int) -> None:
    stream = run_workers(
        Probe(), iter([0, 1, "bad", 3]), num_workers=num_workers, prefetch=2, multiprocessing_context=None
    )
    assert [next(stream)["request"] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError) as caught:
        next(stream)
    assert type(caught.value) is ValueError and str(caught.value) == "shard x.tar is missing"
    assert caught.value.__notes__ == ["Traceback of the worker"]
    assert list(stream) == []


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError, match="a bug"):
        run(["bug"], 1)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("last", ["bad", "bug"])
def test_errors_end_the_workers_at_once(last: str) -> None:
    stream = run_workers(Probe(), iter([0, 1, last]), num_workers=2, prefetch=2, multiprocessing_context=None)
    pids = [next(stream)["pid"] for _ in range(2)]
    with pytest.raises((ValueError, KeyError)):
        next(stream)
    assert not any(alive(pid) for pid in pids)


def test_closing_the_iterator_ends_the_workers() -> None:
    stream = run_workers(Probe(), iter(range(10**9)), num_workers=2, prefetch=2, multiprocessing_context=None)
    pids = [next(stream)["pid"] for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    stream.close()  # type: ignore[attr-defined]
    assert not any(alive(pid) for pid in pids)


SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    from shards.workers import run_workers
    from tests.shards.test_workers import Probe
    {setup}
    stream = run_workers(Probe(), iter(range(10**9)), num_workers=2, prefetch=2, multiprocessing_context=None)
    print(*[next(stream)["pid"] for _ in range(2)], flush=True)
    for batch in stream:
        time.sleep(0.01)
"""


def start(setup: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    """A process that loads for ever, in a process group of its own, and its workers."""
    code = textwrap.dedent(SCRIPT).format(setup=setup)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def wait_for_end(pids: list[int], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "loader processes outlive the main process"
        time.sleep(0.05)


@pytest.mark.parametrize("kill", ["SIGKILL", "SIGTERM"])
def test_no_orphans_when_the_main_process_is_killed(kill: str) -> None:
    process, pids = start()
    try:
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.send_signal(getattr(signal, kill))
        process.wait(30)
        wait_for_end(pids, seconds=60)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_everything_with_one_traceback() -> None:
    process, pids = start()
    try:
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        wait_for_end(pids, seconds=60)
    finally:
        process.kill()
        process.communicate()
    assert error.count("Traceback") == 1 and error.strip().endswith("KeyboardInterrupt")


def test_a_sigterm_to_the_whole_group_is_the_main_process_affair() -> None:
    """torchrun and Slurm stop a process group at once: the main process saves, and goes on reading until it has."""
    process, pids = start("signal.signal(signal.SIGTERM, lambda *_: print('caught', flush=True))")
    try:
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            assert process.stdout is not None and process.stdout.readline() == "caught\n"
        time.sleep(1)
        assert process.poll() is None and all(alive(pid) for pid in pids)
        process.kill()
        wait_for_end(pids, seconds=60)
    finally:
        process.kill()
        process.communicate()
