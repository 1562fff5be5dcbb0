"""The same curve whatever the layout: strategy, ranks, loader workers, accumulation, checkpointing, precision.

The cells are a part of tests/distributed/matrix.py, which runs them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.helper import run_distributed
from tests.distributed.matrix import METHODS, TOLERANCE, largest_difference, train_all, train_cell
from tests.long import only_long
from tests.runs import BATCH, NUM_IMAGES, make_shards, rows, write_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def curves(shards, tmp_path_factory):
    """One process, no workers, no accumulation, for each method."""
    return {m: train_cell(tmp_path_factory.mktemp(m), shards, (m, "ddp", 1, "plain")) for m in METHODS}


@pytest.mark.parametrize(
    ("method", "layout", "ranks", "variant", "workers"),
    [
        ("dinov2", "ddp", 2, "accumulation", 1),
        ("dinov2", "fsdp2", 3, "accumulation", 3),
        pytest.param("dinov2", "fsdp2 hybrid", 4, "checkpointing", 0, marks=only_long),
        pytest.param("dinov2", "zero1", 2, "checkpointing", 0, marks=only_long),
        pytest.param("dinov2", "zero2", 3, "accumulation", 0, marks=only_long),
        pytest.param("dinov2", "zero3", 3, "accumulation", 1, marks=only_long),
        ("dinov2", "zero3", 2, "checkpointing", 0),
        pytest.param("simclr", "ddp", 3, "plain", 0, marks=only_long),
        pytest.param("simclr", "fsdp2 hybrid", 4, "accumulation", 0, marks=only_long),
        # SimCLR under each strategy in one launch: test_global_batch.py
        pytest.param("simclr", "zero1", 3, "accumulation", 0, marks=only_long),
        pytest.param("simclr", "zero2", 2, "accumulation", 0, marks=only_long),
        pytest.param("simclr", "zero3", 3, "accumulation", 0, marks=only_long),
        ("supervised", "fsdp2", 2, "accumulation", 0),
        ("supervised", "zero3", 2, "accumulation", 0),
        pytest.param("supervised_cnn", "ddp", 2, "checkpointing", 0, marks=only_long),
        ("supervised_cnn", "fsdp2", 2, "plain", 0),
        pytest.param("supervised_cnn", "zero3", 3, "plain", 0, marks=only_long),
    ],
)
def test_curves_agree(curves, shards, tmp_path, method, layout, ranks, variant, workers):
    got = train_cell(tmp_path, shards, (method, layout, ranks, variant), f"data.num_workers={workers}")
    assert got[-1]["epoch"] == 20 * BATCH / NUM_IMAGES > 1
    difference, column, step = largest_difference(got, curves[method])
    assert difference < TOLERANCE["fp32"], (column, step)


@pytest.mark.parametrize(
    "layout", ["ddp", "fsdp2", pytest.param("zero2", marks=only_long), pytest.param("zero3", marks=only_long)]
)
def test_bf16_follows_the_curve(curves, shards, tmp_path, layout):
    extra = ["strategy.precision=bf16"]
    got = train_cell(tmp_path, shards, ("dinov2", layout, 2, "checkpointing"), *extra)
    difference, _, _ = largest_difference(got, curves["dinov2"], keys={"loss"})
    assert 0 < difference < TOLERANCE["bf16"]


@only_long  # tests/distributed/test_strategies.py compiles a small method's in minutes less
@pytest.mark.parametrize("layout", ["fsdp2", "zero2"])
def test_compiled_blocks_follow_the_curve(curves, shards, tmp_path, layout):
    got = train_cell(tmp_path, shards, ("dinov2", layout, 2, "checkpointing"), "strategy.compile=true")
    difference, column, step = largest_difference(got, curves["dinov2"])
    assert 0 < difference < TOLERANCE["fp32"], (column, step)


def test_dinov2_follows_one_curve_however_its_batch_of_64_is_laid_out(shards, tmp_path):
    def write(name: str, micro_batch_size: int) -> tuple[str, list[str]]:
        (tmp_path / name).mkdir()
        path = write_recipe(tmp_path / name / "run.yaml", "dinov2", shards=shards)
        changes = ["data.global_batch_size=64", "method.group_size=16", "method.drop_path=0.3"]
        return str(path), [*changes, f"strategy.micro_batch_size={micro_batch_size}"]

    run_distributed(train_all, 1, [write("1x64", 64), write("4x16", 16)])
    run_distributed(train_all, 2, [write("2x2x16", 16)])
    expected = rows(tmp_path / "1x64" / "run")
    for name in ("4x16", "2x2x16"):
        difference, column, step = largest_difference(rows(tmp_path / name / "run"), expected)
        assert difference < TOLERANCE["fp32"], (name, column, step)
