"""Requests to stop: real signals, and a launcher that dies without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scaler.signals import StopSignals

LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
process.wait()
"""
WORKER = """
import os, sys, time
from scaler.signals import StopSignals
with StopSignals() as signals:
    print(os.getppid(), signals.received, flush=True)
    deadline = time.monotonic() + float(sys.argv[1])
    while not signals.received and time.monotonic() < deadline:
        time.sleep(0.02)
    print(signals.received, flush=True)
"""


@pytest.mark.parametrize(
    ("names", "victim", "seconds", "expected"),
    [
        (["torchrun"], 0, 30, signal.SIGTERM),
        (["deepspeed", "deepspeed.launch"], 0, 30, signal.SIGTERM),  # the upper one of two, as on one machine
        (["start-torchrun.sh"], 0, 1, 0),  # a person's own script may end before its training
        (["start.sh", "accelerate"], 0, 1, 0),
    ],
)
def test_the_death_of_the_launcher_is_a_request_to_stop(tmp_path: Path, names, victim, seconds, expected) -> None:
    command = ["-c", WORKER, str(seconds)]
    for name in reversed(names):
        (tmp_path / name).write_text(LAUNCHER)
        command = [str(tmp_path / name), *command]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    parent, received = process.stdout.readline().split()
    assert received == "0" and (int(parent) == process.pid) == (len(names) == 1)
    process.kill()
    assert process.stdout.readline() == f"{int(expected)}\n"
    process.communicate()


def test_ctrl_c_saves_first_and_ends_when_it_is_said_again(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            assert capfd.readouterr().err == "stopping after a checkpoint; Ctrl-C again stops at once\n"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_kept_for_the_next_time_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    with signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before
    with signals:
        assert signals.received == signal.SIGUSR1
