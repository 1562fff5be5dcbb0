"""What a run takes is counted as it then is: bytes of a checkpoint, of a batch, processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaler.collectives import World
from scaler.doctor.finding import Finding
from scaler.doctor.recipe import check
from scaler.optimizers import build_optimizer
from scaler.recipe import load_recipe
from scaler.strategies import strategy_class
from scaler.train import build_method
from tests.runs import METHODS, write_recipe


def looked_at(recipe: str | Path, *overrides: str, processes: int = 1) -> list[Finding]:
    asked = {"recipe": str(recipe), "overrides": overrides, "processes": processes, "ranks": processes}
    return list(check(asked))


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_checkpoint_is_that_of_its_tensors(method: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", method, shards=tmp_path)
    (finding,) = looked_at(path)
    recipe = load_recipe(str(path))
    strategy = strategy_class("ddp")(
        recipe.strategy, world=World(), device=torch.device("cpu"), clip_norm=None, deterministic=True
    )
    built = build_method(recipe, world=World())
    strategy.prepare(built, lambda: build_optimizer(recipe.optim, built.parameter_groups(recipe.optim)))
    assert finding.facts["checkpoint_bytes"] == sum(piece.data.nbytes for piece in strategy.pieces().values())


def test_the_loader_of_a_recipe() -> None:
    words = ["data.shards=a", "data.global_batch_size=64", "data.num_workers=3", "checkpoint.keep_last=4"]
    (finding,) = looked_at("simclr/demo", *words, processes=2)
    facts = finding.facts
    assert (facts["num_checkpoints"], facts["loader_processes"], facts["shards"]) == (5, 6, "a")
    assert facts["loader_bytes"] == 2 * (2 * 3 + 3) * 32 * (2 * 3 * 32 * 32)  # two views of 32 pixels, 32 images a rank
    assert looked_at("simclr/demo", *words, "data.num_workers=0")[0].facts["loader_bytes"] == 0


def test_what_is_wrong_with_a_recipe() -> None:
    (finding,) = looked_at("simclr/demo", "data.shard=a")
    assert finding.level == "error" and "did you mean 'shards'?" in finding.found
    (finding,) = looked_at("simclr/demo", "data.shards=a", "data.global_batch_size=10", processes=4)
    assert finding.level == "error" and finding.found.startswith("a global batch of 10")
