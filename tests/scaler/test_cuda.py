"""What only a GPU can show; skipped elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from scaler.train import main
from tests.runs import make_shards, rows, write_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("recipe", ["simclr/demo", "dinov2/demo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_demo_recipes_train_in_bf16(shards, tmp_path, recipe, strategy, compiled):
    arguments = [
        recipe,
        f"data.shards={shards}",
        f"run.dir={tmp_path}",
        "schedule.total=10 steps",
        "data.num_workers=2",
        f"strategy.name={strategy}",
        "strategy.precision=bf16",
        f"strategy.compile={compiled}",
        "track.wandb=disabled",
    ]
    assert main(arguments) == 0
    table = rows(tmp_path)
    assert len(table) == 10 and all(math.isfinite(row["loss"]) for row in table)
    assert table[-1]["loss"] < table[0]["loss"]


@pytest.mark.parametrize("method", ["simclr", "dinov2"])
def test_a_gpu_follows_the_cpus_curve_in_fp32(shards, tmp_path, method):
    """Same samples, same random numbers, other kernels."""
    curves = []
    for device in ("cpu", "cuda"):
        recipe = write_recipe(tmp_path / f"{device}.yaml", method, shards=shards, run={"dir": str(tmp_path / device)})
        with pytest.MonkeyPatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            assert main([str(recipe), "run.stop_after=8 steps"]) == 0
        curves.append([row["loss"] for row in rows(tmp_path / device)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("method", ["simclr", "dinov2"])
def test_a_resumed_run_is_bit_identical_on_a_gpu_too(shards, tmp_path, method):
    for name, stops in (("whole", ["8 steps"]), ("parts", ["3 steps", "8 steps"])):
        recipe = write_recipe(tmp_path / f"{name}.yaml", method, shards=shards)
        for stop in stops:
            assert main([str(recipe), f"run.stop_after={stop}"]) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_a_run_whose_pictures_the_gpu_decodes_follows_the_curve(shards, tmp_path, capfd):
    for decode in ("cpu", "gpu"):
        recipe = write_recipe(tmp_path / f"{decode}.yaml", "simclr", shards=shards, data={"decode": decode})
        assert main([str(recipe), "run.stop_after=5 steps"]) == 0
    assert "images are decoded on cuda" in capfd.readouterr().out
    by_cpu, by_gpu = ([row["loss"] for row in rows(tmp_path / decode)] for decode in ("cpu", "gpu"))
    assert by_gpu == pytest.approx(by_cpu, rel=0.05)


def test_offloaded_shards_follow_the_curve(shards, tmp_path):
    for name, offload in (("kept", False), ("offloaded", True)):
        recipe = write_recipe(tmp_path / f"{name}.yaml", "dinov2", shards=shards)
        assert (
            main([str(recipe), "strategy.name=fsdp2", f"strategy.cpu_offload={offload}", "run.stop_after=5 steps"]) == 0
        )
    kept, offloaded = ([row["loss"] for row in rows(tmp_path / name)] for name in ("kept", "offloaded"))
    assert offloaded == pytest.approx(kept, rel=1e-4)
