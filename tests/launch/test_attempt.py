"""What a training says in exit.json becomes the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.attempt import run_attempt
from scaler.train import EXIT_CODES
from tests.long import only_long

SAY = 'printf %s "$1" > exit.json; exit $2'
STOPPED, FAILED = '{"reason": "signal", "requeue": true}', '{"reason": "error", "requeue": false}'


@pytest.mark.parametrize(("said", "code", "expected"), [(STOPPED, 1, 75), (FAILED, 1, 1), (FAILED, 0, 0)])
def test_the_word_of_the_training_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, expected: int
) -> None:
    (tmp_path / "exit.json").write_text(said)  # the same as before: it is another one by its time
    monkeypatch.chdir(tmp_path)
    assert run_attempt(tmp_path, ["sh", "-c", f"sleep 0.02; {SAY}", "sh", said, str(code)]) == expected
    assert EXIT_CODES["signal"] == 75


@only_long
def test_the_word_of_an_earlier_attempt_does_not(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text(STOPPED)
    assert run_attempt(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"]) == 3
    (tmp_path / "exit.json").unlink()
    assert run_attempt(tmp_path, [sys.executable, "-c", "raise SystemExit(4)"]) == 4


def test_it_passes_signals_on_and_waits_for_a_word_that_comes_late(tmp_path: Path) -> None:
    (tmp_path / "wait.sh").write_text(
        "trap '(sleep 1; cp said exit.json) & exit 1' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "said").write_text(STOPPED)
    command = [sys.executable, "-m", "launch.attempt", str(tmp_path), "sh", "wait.sh"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
