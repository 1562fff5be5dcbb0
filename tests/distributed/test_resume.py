"""kill -9 at random moments, then start again: not one bit of the run may differ from the unbroken one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from scaler.checkpoint import complete_checkpoints
from scaler.data import build_order
from scaler.recipe import load_recipe
from shards.index import ShardIndex
from tests.long import LONG, only_long
from tests.runs import NUM_IMAGES, make_shards, rows, weights, write_recipe

KILLS = int(os.environ.get("SCALER_TEST_KILLS", "2"))  # per layout; the issue's own figure is 10
STEPS = 60 if LONG else 36


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def recipe_for(folder: Path, name: str, method: str, shards: Path) -> Path:
    return write_recipe(
        folder / f"{name}.yaml",
        method,
        shards=shards,
        data={"global_batch_size": 24, "num_workers": 1},
        schedule={"total": f"{STEPS} steps"},
        checkpoint={"every": "5 steps", "keep_last": 2},
    )


def command(recipe: Path, *, ranks: int, strategy: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "scaler.train", str(recipe), f"strategy.name={strategy}"]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every process below it (torchrun gives its workers sessions of their own)."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def wait_for_moment(run_dir: Path, process: subprocess.Popen, *, step: int, in_save: bool) -> None:
    """Until the run has logged `step`, or after that until a checkpoint is being written."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            folders = list((run_dir / "checkpoints").glob("step-*"))
            if not in_save or any(not (folder / "manifest.json").exists() for folder in folders):
                return
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("method", "ranks", "strategy"),
    [
        pytest.param("dinov2", 1, "ddp", marks=only_long),
        pytest.param("simclr", 2, "ddp", marks=only_long),
        ("dinov2", 2, "fsdp2"),
    ],
)
def test_killed_runs_end_bit_identical(shards, tmp_path, method, ranks, strategy):
    unbroken = recipe_for(tmp_path, "unbroken", method, shards)
    process = start(command(unbroken, ranks=ranks, strategy=strategy))
    output, _ = process.communicate()
    assert process.returncode == 0, output

    recipe, run_dir = recipe_for(tmp_path, "killed", method, shards), tmp_path / "killed"
    rng, kept, untouched = random.Random(f"{method}{ranks}{strategy}"), 0, b""
    for kill in range(KILLS):
        process = start(command(recipe, ranks=ranks, strategy=strategy))
        earliest = max(kept + 1, kill * (STEPS - 12) // KILLS)
        step = rng.randrange(earliest, max(earliest + 1, min(STEPS - 2, earliest + 60 // KILLS)))
        wait_for_moment(run_dir, process, step=step, in_save=kill % 2 == 1)
        kill_all(process)
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert b"".join(lines).startswith(untouched), "rows before a checkpoint are never touched again"
        newest = complete_checkpoints(run_dir / "checkpoints")
        kept = int(newest[0].name.removeprefix("step-")) if newest else 0
        untouched = b"".join(lines[:kept])
    assert kept > 0
    process = start(command(recipe, ranks=ranks, strategy=strategy))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"resuming from {newest[0]}: step {kept}" in output
    assert (run_dir / "metrics.jsonl").read_bytes().startswith(untouched)

    assert rows(run_dir) == rows(tmp_path / "unbroken")
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    mine, reference = (
        weights(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run_dir, tmp_path / "unbroken")
    )
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in mine)
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "done"


@pytest.mark.parametrize(
    ("ranks", "code"), [(1, 75), pytest.param(2, 1, marks=only_long)]
)  # torchrun has a code of its own
def test_sigterm_saves_and_says_so_then_the_run_goes_on(shards, tmp_path, ranks, code):
    recipe = recipe_for(tmp_path, "run", "simclr", shards)
    unbroken = recipe_for(tmp_path, "unbroken", "simclr", shards)
    assert start(command(unbroken, ranks=ranks, strategy="ddp")).wait() == 0
    process = start(command(recipe, ranks=ranks, strategy="ddp"))
    wait_for_moment(tmp_path / "run", process, step=12, in_save=False)
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm and torchrun do: loader workers get it too
    output, _ = process.communicate()
    assert process.returncode == code, output
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert left["reason"] == "signal" and left["requeue"] is True and 12 <= left["step"] < STEPS
    assert left["images"] == 24 * left["step"] == rows(tmp_path / "run")[-1]["images"]
    assert start(command(recipe, ranks=ranks, strategy="ddp")).wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


def test_every_n_consecutive_images_are_one_epoch(shards, tmp_path):
    recipe = load_recipe(str(recipe_for(tmp_path, "run", "dinov2", shards)))
    order = build_order(recipe, ShardIndex.load(shards))
    stream = []
    for batch in (order.batch(24 * k, 24) for k in range(130)):
        stream += zip(batch.images.tolist(), batch.ids.tolist(), strict=True)
    ids = [i for _, i in sorted(stream)]
    for epoch in range(3):
        assert sorted(ids[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES]) == list(range(NUM_IMAGES))
