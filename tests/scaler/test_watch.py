"""Who hangs is found and named, and who is only slow is let alone: real processes, signals and stores."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scaler.watch import Watch, who_hangs

HOST = socket.gethostname()
TIMEOUT = 2  # seconds; a silent peer is given 3 more
STORE = "import time, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"


def run_rank(rank: int, size: int, port: int, steps: int, folder: Path, act: Callable[[Watch, int, int], None]) -> None:
    """What a process does: every step it beats, acts, and meets the others at a barrier of the store."""
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    store = dist.TCPStore("127.0.0.1", port, is_master=False) if port else None
    with Watch(timeout=TIMEOUT) as watch:
        end = folder / f"end-{rank}"
        watch.share(rank=rank, world_size=size, store=store, folder=folder, on_end=end.write_text)
        for step in range(1, steps + 1):
            watch.beat("data", step=step)
            act(watch, rank, step)
            watch.beat("learn", step=step)
            if store is not None and act is not goes_on_alone:
                store.set(f"{step}/{rank}", "")
                store.wait([f"{step}/{other}" for other in range(size)])
            (folder / f"new-{rank}").write_text(str(step))
            (folder / f"new-{rank}").rename(folder / f"step-{rank}")  # never seen half written
            time.sleep(0.05)


def nothing(watch: Watch, rank: int, step: int) -> None:
    pass


def goes_on_alone(watch: Watch, rank: int, step: int) -> None:
    pass


def rank_1_is_stuck(watch: Watch, rank: int, step: int) -> None:
    if step == 5 and rank == 1:
        time.sleep(60)


def rank_0_is_stuck(watch: Watch, rank: int, step: int) -> None:
    if step == 5 and rank == 0:
        time.sleep(60)


def rank_1_is_slow(watch: Watch, rank: int, step: int) -> None:
    for _ in range(6 if step == 2 else 0):
        watch.beat("compile", step=step)
        time.sleep(rank)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def ranks(
    size: int, act: Callable[[Watch, int, int], None], folder: Path, *, port: int, steps: int = 1000
) -> Iterator[list[Any]]:
    """Processes that do `run_rank`; killed in the end."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["scaler.watch"])
    arguments = [(rank, size, port, steps, folder, act) for rank in range(size)]
    processes = [context.Process(target=run_rank, args=a, daemon=True) for a in arguments]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def at_step(folder: Path, rank: int, step: int) -> bool:
    path = folder / f"step-{rank}"
    return path.exists() and int(path.read_text() or 0) >= step


def errors(processes: Sequence[Any], folder: Path, rank: int) -> list[str]:
    """What a rank that ends with code 1 says on its lines that begin with error."""
    processes[rank].join(60)
    text = (folder / f"stderr-{rank}").read_text()
    assert processes[rank].exitcode == 1, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_rank_that_hangs_is_named_with_its_place_by_the_lowest(store, tmp_path):
    with ranks(3, rank_1_is_stuck, tmp_path, port=store.port) as processes:
        [[line], *silence] = [errors(processes, tmp_path, rank) for rank in range(3)]
    assert silence == [[], []]
    assert re.match(rf"error: rank 1 on {HOST} hangs in phase 'data' of step 5 for \d s: .*:\d+ rank_1_is_stuck", line)
    report = json.loads((tmp_path / "hang.json").read_text())
    assert f"error: {report['hang'][0]}" == line and report["silent"] == []
    places = [(record["rank"], record["phase"], record["step"]) for record in report["ranks"]]
    assert places == [(0, "learn", 5), (1, "data", 5), (2, "learn", 5)]
    assert any("rank_1_is_stuck" in line for line in report["ranks"][1]["stack"])
    assert (tmp_path / "end-0").read_text() == report["hang"][0] and not (tmp_path / "end-1").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_the_others(store, tmp_path, victim):
    with ranks(2, nothing, tmp_path, port=store.port) as processes:
        wait_until(lambda: at_step(tmp_path, 1, 20))
        os.kill(processes[victim].pid, signal.SIGSTOP)
        [line] = errors(processes, tmp_path, 1 - victim)
        assert line.startswith(f"error: rank {victim} on {HOST} (process {processes[victim].pid}) does not answer; ")
    assert json.loads((tmp_path / "hang.json").read_text())["silent"] == [victim]


def test_who_is_slow_but_moves_is_waited_for(store, tmp_path):
    with ranks(2, rank_1_is_slow, tmp_path, port=store.port, steps=4) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    assert not (tmp_path / "hang.json").exists()


def test_time_in_which_the_whole_group_was_suspended_does_not_count(store, tmp_path):
    with ranks(2, nothing, tmp_path, port=store.port) as processes:
        wait_until(lambda: at_step(tmp_path, 1, 5) and at_step(tmp_path, 0, 5))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(2 * TIMEOUT if number == signal.SIGSTOP else 0)
        reached = int((tmp_path / "step-0").read_text())
        wait_until(lambda: at_step(tmp_path, 0, reached + 60) or not processes[0].is_alive())
        assert [process.exitcode for process in processes] == [None, None]


def test_one_process_alone_names_itself(tmp_path):
    with ranks(1, rank_0_is_stuck, tmp_path, port=0) as processes:
        [line] = errors(processes, tmp_path, 0)
    assert re.match(rf"error: rank 0 on {HOST} hangs in phase 'data' of step 5 for 2 s: .* rank_0_is_stuck", line)
    [record] = json.loads((tmp_path / "hang.json").read_text())["ranks"]
    assert record["children"] == [] and "rank_0_is_stuck" in record["at"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_is_gone_is_named(tmp_path, ending):
    """The processes themselves go on without it; nobody could say any more who hangs."""
    server = subprocess.Popen(
        [sys.executable, "-c", f"{STORE}; print(s.port, flush=True); time.sleep(300)"], stdout=-1, text=True
    )
    try:
        assert server.stdout is not None
        with ranks(2, goes_on_alone, tmp_path, port=int(server.stdout.readline())) as processes:
            wait_until(lambda: at_step(tmp_path, 0, 5) and at_step(tmp_path, 1, 5))
            server.send_signal(ending)
            for rank in range(2):
                [line] = errors(processes, tmp_path, rank)
                assert line.startswith(f"error: rank {rank} on {HOST} in phase ")
                assert "the rendezvous store has not answered for " in line
    finally:
        server.kill()
        server.communicate()


def test_the_age_of_the_heartbeat_file_tells_a_probe_that_the_process_lives(tmp_path):
    with ranks(1, nothing, tmp_path, port=0) as [process]:
        path = tmp_path / "heartbeat" / "rank-00000.json"
        wait_until(path.exists)
        record, first = json.loads(path.read_text()), path.stat().st_mtime
        assert record["pid"] == process.pid and record["host"] == HOST and record["phase"] in ("start", "data", "learn")
        wait_until(lambda: path.stat().st_mtime > first, 20)
        assert json.loads(path.read_text())["step"] > record["step"]


@pytest.mark.parametrize(
    ("counts", "quiet", "silent", "expected"),
    [
        ([7, 6, 7], [30, 31, 30], [], [1]),
        ([7, 6, 7], [30, 5, 30], [], []),  # the least advanced still moves
        ([7, 6, 6], [30, 31, 5], [], []),
        ([6, 6, 6], [30, 30, 30], [], [0, 1, 2]),
        ([7, 6, 7], [30, 31, 0], [2], [2]),  # worse than being behind
    ],
)
def test_who_hangs(counts, quiet, silent, expected):
    records = {rank: {"count": counts[rank], "quiet": quiet[rank]} for rank in range(3)}
    assert who_hangs(records, frozenset(silent), timeout=30) == expected
