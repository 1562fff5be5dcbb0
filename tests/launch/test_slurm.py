"""The job file on a real Slurm cluster: preempted, out of time, failed, cancelled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.job import Job
from launch.slurm import plan
from tests.long import only_long
from tests.runs import make_shards, rows, write_recipe
from tests.slurm import Cluster, slurm

# 1: also the time limit, for which Slurm looks every 30 s only, and `scontrol requeue`
LONG = os.environ.get("SCALER_TEST_SLURM") == "1"
STEPS = 500 if LONG else 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm(2) as found:
        yield found


def recipe_for(path: Path, shards: Path) -> Path:
    return write_recipe(
        path,
        "simclr",
        shards=shards,
        data={"global_batch_size": 24, "num_workers": 1},
        schedule={"total": f"{STEPS} steps"},
    )


def submit(cluster: Cluster, job: Job, *, folder: Path, **options: object) -> str:
    """Write the job file as `scaler launch slurm --run` does, and submit it."""
    launch = plan(job, gpus=False, **options)
    for name, text in launch.files.items():
        (folder / name).write_text(text)
    assert launch.command[0] == "sbatch"
    return cluster.submit(Path(*launch.command[1:]), cwd=folder)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (path := run_dir / "metrics.jsonl").exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, f"{run_dir} never came to step {step}"
        time.sleep(0.02)


def wait_for_restart(cluster: Cluster, job: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while cluster.field(job, "Restarts") != str(count):
        assert time.monotonic() < deadline, f"job {job} was not put back into the queue"
        time.sleep(0.3)


def test_a_job_that_was_interrupted_ends_as_the_unbroken_one(
    cluster: Cluster, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = recipe_for(tmp_path / "unbroken.yaml", shards)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "scaler.train", str(reference)], check=True, capture_output=True)

    recipe_for(tmp_path / "a run.yaml", shards)  # relative to the folder of sbatch, with a blank
    job = Job(recipe="a run.yaml", overrides=("run.dir=a run",), nodes=2)
    monkeypatch.chdir(tmp_path)
    number = submit(cluster, job, folder=tmp_path, time="20", grace=50)
    run_dir, log = tmp_path / "a run", tmp_path / f"a-run-{number}.out"

    wait_for_step(run_dir, 12)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"]
    other = cluster.run(urgent).strip()
    wait_for_restart(cluster, number, 1)
    left = json.loads((run_dir / "exit.json").read_text())
    assert left["requeue"] is True and 12 <= left["step"] < STEPS
    assert cluster.wait(other, "COMPLETED") == "COMPLETED", "the urgent job got its nodes"

    interruptions = 1
    if LONG:
        wait_for_step(run_dir, left["step"] + 12)
        cluster.run(["scontrol", "update", f"JobId={number}", "TimeLimit=1"])
        wait_for_restart(cluster, number, 2)
        cluster.run(["scontrol", "update", f"JobId={number}", "TimeLimit=20"])
        left = json.loads((run_dir / "exit.json").read_text())
        wait_for_step(run_dir, left["step"] + 12)
        cluster.run(["scontrol", "requeue", number])
        wait_for_restart(cluster, number, 3)
        interruptions = 3

    assert cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", log.read_text()
    assert rows(run_dir) == rows(tmp_path / "unbroken")
    assert len(rows(run_dir)) == STEPS
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "done"
    text = log.read_text()
    assert [f"attempt {i + 1} of job {number} on host[1-2]" in text for i in range(9)].count(True) == interruptions + 1
    assert text.count("resuming from ") == interruptions
    assert "2 ranks" in text


@only_long
def test_a_failure_and_scancel_are_not_undone(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    recipe = str(recipe_for(tmp_path / "first.yaml", shards))
    stale, cancelled = tmp_path / "stale", tmp_path / "cancelled"
    stale.mkdir()
    (stale / "exit.json").write_text('{"reason": "signal", "requeue": true}\n')
    wrong = Job(recipe, overrides=(f"run.dir={stale}", "data.shards=/nowhere"), max_restarts=0)
    failing = submit(cluster, wrong, folder=tmp_path)
    long = Job(recipe, overrides=(f"run.dir={cancelled}", "schedule.total=100000 steps"))
    running = submit(cluster, long, folder=tmp_path)

    wait_for_step(cancelled, 3)
    cluster.run(["scancel", running])
    assert cluster.wait(running, "CANCELLED", "PENDING", "COMPLETED") == "CANCELLED"
    assert json.loads((cancelled / "exit.json").read_text())["requeue"] is True, "it has saved all the same"
    assert cluster.wait(failing, "FAILED", "PENDING") == "FAILED"
    assert "/nowhere" in (tmp_path / f"stale-{failing}.out").read_text()
    assert [cluster.field(job, "Restarts") for job in (running, failing)] == ["0", "0"]


def test_the_file_says_what_was_asked_for(shards: Path, tmp_path: Path) -> None:
    recipe = str(recipe_for(tmp_path / "first.yaml", shards))
    job = Job(
        recipe,
        overrides=("run.dir=/data/it's here",),
        nodes=4,
        min_nodes=2,
        processes=8,
        environment={"NCCL_DEBUG": "a b"},
    )
    asked = {"time": "12:00:00", "partition": "gpu", "account": "vision", "cpus": 96, "memory": "0"}
    launch = plan(job, sbatch=["qos=high", "exclusive"], **asked)
    lines = launch.text.splitlines()
    wanted = "time=12:00:00 partition=gpu account=vision cpus-per-task=96 mem=0 nodes=2-4 gpus-per-node=8 qos=high"
    for option in [*wanted.split(), "signal=USR1@120", "requeue", "exclusive", "job-name=it-s-here"]:
        assert f"#SBATCH --{option}" in lines
    assert "export NCCL_DEBUG='a b'" in lines
    assert launch.files == {launch.command[1]: launch.text}
    assert subprocess.run(["bash", "-n"], input=launch.text, text=True).returncode == 0
    train = next(line for line in lines if "scaler.train" in line)
    words = subprocess.run(["bash", "-c", f"printf '%s\n' {train}"], capture_output=True, text=True).stdout
    assert words.splitlines() == job.train

    assert "--gpus-per-node" not in plan(job, gpus=False).text
    with pytest.raises(ValueError, match="no option of sbatch"):
        plan(job, sbatch=["--qos=high"])
    with pytest.raises(ValueError, match="no option of sbatch"):
        plan(job, time="1 day")
    with pytest.raises(ValueError, match="port 65000"):
        plan(Job(recipe, port=65000))
