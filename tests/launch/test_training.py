"""Real trainings over two hosts, started by each launcher: the same curve as one process.

By default two of them; SCALER_TEST_HOSTS=all runs all, and how a signal stops them.
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
        ("deepspeed", "zero2"),
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
    words = [f"run.dir={run}", "schedule.total=100000 steps"]
    process = start(machines[0], kind, reference, *words)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1 if kind == "deepspeed" else signal.SIGKILL)
    process.communicate(timeout=100)
    while any(host.processes() for host in machines):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    state = yaml.safe_load((run / "exit.json").read_text())
    assert state["reason"] == "signal" and state["step"] >= 2
    assert (run / f"checkpoints/step-{state['step']:08d}/manifest.json").exists()
