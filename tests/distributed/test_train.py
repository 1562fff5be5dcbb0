"""The same curve whatever the layout: ranks, strategy, loader workers, accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.helper import run_distributed
from tests.runs import BATCH, NUM_IMAGES, make_shards, rows, train_job, write_recipe

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def curves(shards, tmp_path_factory):
    """One process, no workers, no accumulation, for each method."""
    folder, found = tmp_path_factory.mktemp("reference"), {}
    for method in ("dinov2", "simclr"):
        recipe = write_recipe(folder / f"{method}.yaml", method, shards=shards)
        assert run_distributed(train_job, 1, str(recipe), []) == ["done"]
        found[method] = rows(folder / method)
    return found


@pytest.mark.parametrize("method", ["dinov2", "simclr"])
@pytest.mark.parametrize(
    ("ranks", "strategy", "workers", "accumulation"),
    [
        (1, "fsdp2", 1, 2),
        (2, "ddp", 1, 2),
        (2, "fsdp2", 0, 1),
        (3, "ddp", 0, 1),
        (3, "fsdp2", 3, 2),
    ],
)
def test_curves_agree(curves, shards, tmp_path, method, ranks, strategy, workers, accumulation):
    recipe = write_recipe(tmp_path / "run.yaml", method, shards=shards)
    overrides = [
        f"strategy.name={strategy}",
        f"data.num_workers={workers}",
        f"strategy.micro_batch_size={BATCH // ranks // accumulation}",
    ]
    run_distributed(train_job, ranks, str(recipe), overrides)
    got = rows(tmp_path / "run")
    assert len(got) == len(curves[method]) == 20 and got[-1]["epoch"] == 20 * BATCH / NUM_IMAGES > 1
    for mine, reference in zip(got, curves[method], strict=True):
        assert mine.keys() == reference.keys()
        for key, value in reference.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), (key, reference["step"])
        assert reference["grad_norm"] > 0.1, "clipping must be active"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("fp32", True)])
def test_other_precisions_and_compile_follow_the_curve(curves, shards, tmp_path, strategy, precision, compiled):
    recipe = write_recipe(tmp_path / "run.yaml", "dinov2", shards=shards)
    overrides = [f"strategy.name={strategy}", f"strategy.precision={precision}", f"strategy.compile={compiled}",
                 "strategy.activation_checkpointing=blocks", "run.stop_after=8 steps"]  # fmt: skip
    run_distributed(train_job, 2, str(recipe), overrides)
    got = [row["loss"] for row in rows(tmp_path / "run")]
    reference = [row["loss"] for row in curves["dinov2"]][:8]
    assert got == pytest.approx(reference, rel=2e-2 if precision == "bf16" else TOLERANCE)
    assert got != reference
