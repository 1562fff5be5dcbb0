"""A run whose batch grows from 64 to 256 images, and whose images grow too, and that is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from scaler.collectives import World
from scaler.data import build_order
from scaler.recipe import load_recipe
from scaler.timetable import Timetable
from shards.index import ShardIndex
from tests.distributed.helper import run_distributed
from tests.distributed.matrix import TOLERANCE, largest_difference
from tests.long import LONG, only_long
from tests.runs import NUM_IMAGES, make_shards, rows, train_job, weights, write_recipe

STAGES = [
    {"until": "10 steps", "global_batch_size": 64, "image_size": 16},
    {"until": "15 steps", "global_batch_size": 128},
]
STEPS = 20  # the first epoch ends inside step 13, the second one inside step 18
SIZES = [64] * 10 + [128] * 5 + [256] * 5


def recipe_for(path: Path, method: str, shards: Path) -> Path:
    return write_recipe(
        path,
        method,
        shards=shards,
        data={"global_batch_size": 256, "stages": STAGES},
        schedule={"total": f"{STEPS} steps"},
        checkpoint={"every": "3 steps"},
    )


def killed_job(world: World, recipe: str, step: int) -> None:
    """Train until `step` is in the log, and die at once by SIGKILL."""
    log = Path(recipe).with_suffix("") / "metrics.jsonl"

    def watch() -> None:
        while not log.exists() or log.read_bytes().count(b"\n") < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    train_job(world, recipe, [])


@pytest.mark.parametrize("method", ["supervised", pytest.param("dinov2", marks=only_long)])
def test_a_ramp_that_is_killed_is_the_ramp_that_is_not(tmp_path: Path, method: str) -> None:
    shards = make_shards(tmp_path)
    whole, killed, spread = (
        str(recipe_for(tmp_path / f"{name}.yaml", method, shards)) for name in ("whole", "killed", "spread")
    )
    run_distributed(train_job, 1, whole, [])
    wanted = rows(tmp_path / "whole")
    images = [sum(SIZES[: step + 1]) for step in range(STEPS)]
    assert [row["images"] for row in wanted] == images

    for step in (11, 17) if LONG else (11,):  # a step after the batch has grown; its checkpoint is from before that
        with pytest.raises(RuntimeError, match="exit code -9"):
            run_distributed(killed_job, 1, killed, step)
    run_distributed(train_job, 1, killed, [])
    assert rows(tmp_path / "killed") == wanted
    mine, reference = (weights(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}") for name in ("killed", "whole"))
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in mine)

    # Two ranks: one micro-batch of 32 images each in the beginning, and four in the end.
    run_distributed(train_job, 2, spread, ["strategy.micro_batch_size=32"])
    difference, column, step = largest_difference(rows(tmp_path / "spread"), wanted)
    assert difference < TOLERANCE["fp32"], (column, step)

    recipe = load_recipe(whole)
    timetable, order = Timetable(recipe, num_samples=NUM_IMAGES), build_order(recipe, ShardIndex.load(shards))
    seen: dict[int, int] = {}
    for step, size in enumerate(SIZES):
        batch = order.batch(timetable.images(step), size)
        seen |= dict(zip(batch.images.tolist(), batch.ids.tolist(), strict=True))
    assert sorted(seen) == list(range(images[-1]))
    for epoch in range(images[-1] // NUM_IMAGES):
        first = epoch * NUM_IMAGES
        assert sorted(seen[image] for image in range(first, first + NUM_IMAGES)) == list(range(NUM_IMAGES))
