"""Commands on several hosts as if they were one process here: their words, signals and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import TestHost, hosts

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from launch.remote import run_on_hosts
commands, min_hosts = json.loads(sys.argv[1])
commands = {host: ["sh", "-c", script] for host, script in commands.items()}
sys.exit(run_on_hosts(commands, folder=sys.argv[2], processes=1, min_hosts=min_hosts))
"""
# A worker in a session of its own, as torchrun's are, that ignores what would end it politely.
STUBBORN = "setsid sh -c 'trap : TERM; while :; do sleep 0.3; done' & wait"


@pytest.fixture(scope="module")
def machines() -> Iterator[list[TestHost]]:
    with hosts(2) as found:
        yield found


@pytest.fixture
def start(machines: list[TestHost], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `host → shell script` from the first host."""
    started = []

    def start(commands: dict[str, str], *, min_hosts: int | None = None) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", CODE, json.dumps([commands, min_hosts]), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(machines[0].popen(words, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def finished(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out.splitlines()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def idle(machines: list[TestHost]) -> bool:
    return not any(host.processes() for host in machines)


def test_words_come_back_with_their_host(start: Any, machines: list[TestHost], tmp_path: Path) -> None:
    script = "pwd; echo \"$OMP_NUM_THREADS 'a  b'\" >&2; hostname"
    code, lines = finished(start({"host1": script, "host2": script}))
    assert code == 0
    cores = str(len(os.sched_getaffinity(0)))
    for name in ("host1", "host2"):
        mine = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
        assert mine == [str(tmp_path), f"{cores} 'a  b'", name], lines


def test_the_first_failure_ends_the_others_and_all_that_they_started(start: Any, machines: list[TestHost]) -> None:
    began = time.monotonic()
    code, lines = finished(start({"host1": "sleep 1; exit 7", "host2": f"echo up; trap 'exit 1' TERM; {STUBBORN}"}))
    assert code == 7 and "host1: ended with exit code 7" in lines and "host2: up" in lines
    assert time.monotonic() - began < 40
    assert idle(machines)


def test_a_host_that_can_be_spared(start: Any, machines: list[TestHost], tmp_path: Path) -> None:
    commands = {"host1": "sleep 2; echo done", "host2": "exit 3"}
    code, lines = finished(start(commands, min_hosts=1))
    assert code == 0 and {"host1: done", "host2: ended with exit code 3"} <= set(lines)
    commands["host1"] = "sleep 2; exit 4"
    assert finished(start(commands, min_hosts=1))[0] == 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_are_passed_on_and_waited_for(start: Any, name: str, tmp_path: Path) -> None:
    trap = f"trap 'sleep 1; echo saved; exit 5' {name.removeprefix('SIG')}; touch ready-$(hostname); "
    script = trap + "while :; do sleep 0.1; done"
    process = start({"host1": script, "host2": script})
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.send_signal(getattr(signal, name))
    code, lines = finished(process)
    assert code == 5 and {"host1: saved", "host2: saved"} <= set(lines)


@pytest.mark.parametrize("ending", ["killed", "cut off"])
def test_nobody_waits_any_more(start: Any, machines: list[TestHost], tmp_path: Path, ending: str) -> None:
    """The command is told to stop, may still say something, and is gone with all that it started."""
    process = start({"host2": f"trap 'echo bye; sleep 0.5; echo bye; touch left; exit' TERM; touch ready; {STUBBORN}"})
    wait_for((tmp_path / "ready").exists)
    wait_for(lambda: len(machines[1].processes()) >= 3)
    if ending == "killed":
        process.kill()
    else:
        assert machines[1].run(["pkill", "-KILL", "-f", "^sshd: root"]).returncode == 0
    wait_for((tmp_path / "left").exists)
    wait_for(lambda: idle(machines))
    if ending == "cut off":
        code, lines = finished(process)
        assert code == 255 and any(line.startswith("host2: connection lost") for line in lines)
