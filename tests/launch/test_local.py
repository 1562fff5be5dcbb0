"""The launcher really starts processes, from the configuration files that users get."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.local import environment, run, train_command

PROBE = """
import json, os, pathlib, sys
rank = os.environ.get("RANK", "alone")
names = [n for n in os.environ if n.startswith(("FSDP", "ACCELERATE", "OMP", "WORLD_SIZE", "TORCHELASTIC_MAX"))]
seen = {"arguments": sys.argv[1:], **{name: os.environ[name] for name in names}}
pathlib.Path(f"rank-{rank}.json").write_text(json.dumps(seen))
"""

WAIT = """
import pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path("signal").write_text(signal.Signals(number).name)
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, leave)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """What every rank saw of a command in which a probe stands for the training."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = train_command("dinov2/demo", ["run.dir=a folder", "schedule.total=5 steps"], **options)
    command[command.index("scaler.train")] = "probe"
    assert run(command, processes=options["processes"]) == 0
    return {path.stem.removeprefix("rank-"): json.loads(path.read_text()) for path in tmp_path.glob("rank-*.json")}


def test_one_process_runs_without_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = started(tmp_path, monkeypatch, processes=1)
    assert list(seen) == ["alone"]
    assert seen["alone"]["arguments"] == ["dinov2/demo", "run.dir=a folder", "schedule.total=5 steps"]
    assert "WORLD_SIZE" not in seen["alone"]


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp2", 2), ("fsdp2_hybrid", 4), ("zero2", 2)])
def test_accelerate_starts_all_ranks_and_names_the_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Any, processes: int
) -> None:
    seen = started(tmp_path, monkeypatch, processes=processes, strategy=strategy, max_restarts=2)
    assert sorted(seen) == [str(rank) for rank in range(processes)]
    for rank in seen.values():
        assert rank["arguments"] == ["dinov2/demo", "run.dir=a folder", "schedule.total=5 steps"]
        assert rank["WORLD_SIZE"] == str(processes)
        assert rank["TORCHELASTIC_MAX_RESTARTS"] == "2"
        assert rank["ACCELERATE_MIXED_PRECISION"] == "no"
        assert int(rank["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // processes)
        assert rank.get("FSDP_VERSION") == ("2" if strategy.startswith("fsdp2") else None)
        assert rank.get("ACCELERATE_USE_FSDP") == ("true" if strategy.startswith("fsdp2") else None)
        assert rank.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == ("2" if strategy == "zero2" else None)


def test_auto_is_ddp_and_names_a_file_that_exists() -> None:
    command = train_command("simclr/demo", processes=3)
    config = Path(command[command.index("--config_file") + 1])
    assert config.is_file() and config.name == "ddp.yaml"
    assert command == train_command("simclr/demo", processes=3, strategy="ddp")


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 processes"):
        train_command("simclr/demo", processes=0)


def test_a_thread_count_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(2)["OMP_NUM_THREADS"] == "5"


def test_the_exit_code_comes_back(tmp_path: Path) -> None:
    assert run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_are_passed_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "wait_here.py").write_text(WAIT)
    parent = "import sys; from launch.local import run; sys.exit(run([sys.executable, 'wait_here.py']))"
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=30) == 7
    assert (tmp_path / "signal").read_text() == name
