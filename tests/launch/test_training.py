"""Real trainings over two hosts, started by each launcher: the same curve as one process.

By default one of them; SCALER_TEST_HOSTS=all runs all, and how they end and go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.helper import run_distributed
from tests.hosts import TestHost, hosts
from tests.runs import make_shards, rows, train_job, write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 4
TOLERANCE = 1e-4
everything = pytest.mark.skipif(os.environ.get("SCALER_TEST_HOSTS") != "all", reason="SCALER_TEST_HOSTS=all runs it")


@pytest.fixture(scope="module")
def machines() -> Iterator[list[TestHost]]:
    with hosts(2) as found:
        yield found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, machines: list[TestHost]) -> Path:
    """A folder with shards, a recipe, its curve of one process, and the hostfile."""
    folder = tmp_path_factory.mktemp("training")
    schedule = {"total": f"{STEPS} steps", "warmup": "2 steps"}
    recipe = write_recipe(folder / "alone.yaml", "dinov2", shards=make_shards(folder), schedule=schedule)
    assert run_distributed(train_job, 1, str(recipe), []) == ["done"]
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in machines))
    return folder


def start(host: TestHost, kind: str, folder: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """`scaler launch … --run` on this host, over both."""
    command = [sys.executable, "-m", "scaler.cli", "launch", kind, str(folder / "alone.yaml"), *words]
    command += ["--hosts", str(folder / "hostfile"), "--run"]
    return host.popen(command, cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        pytest.param("deepspeed", "zero2", marks=everything),  # tests/test_readme.py starts it, too
        ("accelerate", "fsdp2"),
        pytest.param("accelerate", "zero2", marks=everything),
        pytest.param("accelerate", "ddp", marks=everything),
        pytest.param("torchrun", "fsdp2", marks=everything),
        pytest.param("torchrun", "zero3", marks=everything),
        pytest.param("deepspeed", "fsdp2", marks=everything),
    ],
)
def test_two_hosts_train_as_one_process(
    machines: list[TestHost], reference: Path, tmp_path: Path, kind: str, strategy: str
) -> None:
    words = [f"strategy.name={strategy}", f"run.dir={tmp_path}/run"]
    process = start(machines[0], kind, reference, *words)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert f"strategy {strategy}, ranks 2," in out and "host1: " in out and "host2: " in out
    resolved = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert resolved["strategy"]["name"] == strategy
    got, expected = rows(tmp_path / "run"), rows(reference / "alone")
    assert len(got) == len(expected) == STEPS
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), (key, theirs["step"])
    assert not any(host.processes() for host in machines)


@everything
@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_a_signal_saves_a_checkpoint_on_both_hosts(
    machines: list[TestHost], reference: Path, tmp_path: Path, kind: str
) -> None:
    """Also the loss of whoever started it is one: nobody is left behind on the hosts."""
    run = tmp_path / "run"
    process = start(machines[0], kind, reference, f"run.dir={run}", "schedule.total=100000 steps")
    wait_for_rows(run, 2, process)
    process.send_signal(signal.SIGUSR1 if kind == "deepspeed" else signal.SIGKILL)
    process.communicate(timeout=100)
    deadline = time.monotonic() + 100
    while any(host.processes() for host in machines):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    state = yaml.safe_load((run / "exit.json").read_text())
    assert state["reason"] == "signal" and state["step"] >= 2
    assert (run / f"checkpoints/step-{state['step']:08d}/manifest.json").exists()


@everything
@pytest.mark.parametrize(("kind", "lost"), [("accelerate", "process"), ("torchrun", "process"), ("torchrun", "host")])
def test_a_run_goes_on_without_what_it_lost(reference: Path, tmp_path: Path, kind: str, lost: str) -> None:
    """A process is started again with all the others; without a host the rest does its work, if that is enough."""
    schedule, run = "schedule.total=20 steps", tmp_path / "run"
    with hosts(2) as (one, two):
        words = [
            f"run.dir={run}",
            schedule,
            "checkpoint.every=2 steps",
            "strategy.min_ranks=1",
            "run.timeout_minutes=1",
        ]
        process = start(one, kind, reference, *words)
        wait_for_rows(run, 5, process)
        if lost == "host":
            two.lose()
        else:
            assert two.kill("python -u -m scaler.train") == 1
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    ranks = [line.split("ranks ")[1][0] for line in out.splitlines() if "engaged: " in line]
    assert ranks == ["2", "1" if lost == "host" else "2"]
    assert run_distributed(train_job, 1, str(reference / "alone.yaml"), [schedule, f"run.dir={tmp_path}/whole"]) == [
        "done"
    ]
    got, expected = rows(run), rows(tmp_path / "whole")
    assert [row["step"] for row in got] == list(range(1, 21))
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=TOLERANCE)


def wait_for_rows(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
