"""The hosts of `tests.hosts` are as separate as machines, and nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import hosts

ROOT = Path(__file__).parents[1]
PING = ["ssh", "-o", "ConnectTimeout=2", "host2", "hostname"]


def test_hosts_reach_each_other_by_name(tmp_path: Path) -> None:
    with hosts(3) as machines:
        for source in machines:
            names = source.run(["sh", "-c", "for h in host1 host2 host3; do ssh $h hostname; done"]).stdout.split()
            assert names == ["host1", "host2", "host3"]
        spread = machines[0].run(["pdsh", "-R", "ssh", "-w", "host[1-3]", "hostname"])
        assert {f"host{i}: host{i}" for i in (1, 2, 3)} <= set(spread.stdout.splitlines())
        assert machines[1].run(["ssh", "-o", "BatchMode=yes", "nobody@host1", "true"]).returncode == 255


def test_a_cable_that_is_pulled_and_put_back() -> None:
    with hosts(2) as (one, two):
        two.cut()
        assert one.run(PING).returncode == 255
        two.restore()
        assert one.run(PING).stdout == "host2\n"
        two.lose()
        assert one.run(PING).returncode == 255


def test_folder_environment_signals_and_exit_code_of_a_command(tmp_path: Path) -> None:
    with hosts(1) as (one,):
        shown = one.run(["sh", "-c", "pwd; echo $WORD; exit 3"], cwd=tmp_path, env={**os.environ, "WORD": "a b"})
        assert (shown.stdout, shown.returncode) == (f"{tmp_path}\na b\n", 3)
        process = one.popen(["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"], stdout=-1)
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=10) == 7
        with pytest.raises(subprocess.TimeoutExpired):
            one.run(["sleep", "60"], timeout=0.5)
        assert one.processes() == []


@pytest.mark.parametrize("ending", ["return", "raise", "kill"])
def test_nothing_stays_behind(ending: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from tests.hosts import hosts
with hosts(2) as (one, two):
    two.popen(["setsid", "sleep", "61.5"])
    one.popen(["ssh", "host2", "nohup sleep 61.5"])
    while len(two.processes()) < 3: pass
    print(one.init, two.init, one.switch, flush=True)
    if {ending!r} == "raise": raise KeyError
    if {ending!r} == "kill": os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=-1, timeout=60, text=True)
    if not process.stdout:
        with hosts(1):  # says why there can be none
            pytest.fail("no hosts were made in another process, but here they are")
    assert process.returncode == {"return": 0, "raise": 1, "kill": -signal.SIGKILL}[ending]
    pids = [Path("/proc", number) for number in process.stdout.split()]
    deadline = time.monotonic() + 10
    while any(p.exists() for p in pids) or b"\x0061.5\x00" in _command_lines():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _command_lines() -> bytes:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue
    return b"".join(lines)
