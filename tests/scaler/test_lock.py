"""Two runs cannot write one run directory: real processes, real locks."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaler.lock import hold

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from scaler.lock import hold
with hold(Path(sys.argv[1])):
    if "fork" in sys.argv:  # as the loader's workers are
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True).start()
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path, and has a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "fork"], stdin=-1, stdout=-1, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, 9)
    process.communicate()


def test_a_second_run_is_refused_by_name(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(2):  # being refused must not break the lock either
        with pytest.raises(ValueError, match="another run") as error, hold(tmp_path, wait=0.5):
            pass
        message = str(error.value)
        assert f"process {holder.pid} on {socket.gethostname()}, since 20" in message and "\n" not in message


def test_it_waits_for_one_that_ends_meanwhile(holder: subprocess.Popen[str], tmp_path: Path, capfd) -> None:
    assert holder.stdin is not None
    holder.stdin.write("end\n")
    holder.stdin.flush()
    with hold(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid() != holder.pid


def test_sigkill_gives_it_back_although_a_child_lives_on(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    [child] = [int(n) for n in Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()]
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with hold(tmp_path, wait=0):
        assert time.monotonic() - start < 1
        os.kill(child, 0)  # it is still there


def test_it_is_kept_until_the_end_and_then_given_back(tmp_path: Path) -> None:
    def attempt() -> int:
        imports = "import sys; from pathlib import Path; from scaler.lock import hold"
        code = f"{imports}\nwith hold(Path(sys.argv[1]), wait=0): pass"
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL).returncode

    with hold(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=int)  # its end closes its copy of the file
        child.start()
        child.join()
        assert attempt() == 1
    assert attempt() == 0
