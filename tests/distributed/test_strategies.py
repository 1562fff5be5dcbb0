"""Every strategy trains the same model: losses, clipping, accumulation, EMA, checkpointing, compile, fp16 scaling."""

from __future__ import annotations

import pytest
import torch

from scaler.collectives import World
from scaler.strategies import STRATEGIES
from scaler.strategies.base import local_shard
from tests.distributed.helper import run_distributed
from tests.tiny import tiny_steps, tiny_strategy


def run(world: World, name: str, micro_batches: int, optimizer: str, settings: dict) -> tuple[list[float], dict]:
    strategy = tiny_strategy(name, world, optimizer=optimizer, **settings)
    losses = tiny_steps(strategy, world, first=0, count=6, micro_batches=micro_batches)
    return losses, strategy.report()


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {optimizer: run_distributed(run, 1, "ddp", 1, optimizer, {})[0][0] for optimizer in ("adamw", "sgd", "lars")}


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "optimizer", "settings"),
    [
        (1, 2, "adamw", {}),
        (2, 1, "adamw", {}),
        (2, 3, "adamw", {"activation_checkpointing": "blocks"}),
        (3, 2, "lars", {"activation_checkpointing": 1}),
        (3, 1, "sgd", {}),
        (2, 2, "adamw", {"compile": True}),
    ],
)
def test_losses_do_not_depend_on_the_strategy(reference, name, ranks, micro_batches, optimizer, settings):
    for losses, report in run_distributed(run, ranks, name, micro_batches, optimizer, settings):
        assert losses == pytest.approx(reference[optimizer], rel=2e-6)
        assert report["strategy"] == name and report["ranks"] == ranks
        assert (report["sharded_tensors"] > 0) == (name == "fsdp2")
        if name == "fsdp2" and ranks > 1:
            assert report["parameters_on_rank_0"] < 0.6 * report["parameters"]


@pytest.mark.parametrize("settings", [{"reshard_after_forward": False}, {"cpu_offload": True}])
def test_fsdp2_policies(reference, settings):
    if settings.get("cpu_offload") and not torch.cuda.is_available():
        pytest.skip("offloading moves shards from a GPU to the host: no CUDA device here")
    for losses, _ in run_distributed(run, 2, "fsdp2", 1, "adamw", settings):
        assert losses == pytest.approx(reference["adamw"], rel=2e-6)


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
def test_mixed_precision_follows_fp32(reference, name, precision, tolerance):
    for losses, report in run_distributed(run, 2, name, 2, "adamw", {"precision": precision}):
        assert losses == pytest.approx(reference["adamw"], rel=tolerance)
        assert losses != reference["adamw"] and report["precision"] == precision


def poisoned(world: World, name: str) -> tuple[float, float, float, int]:
    """One good step, then one whose gradient is infinite on the last rank only."""
    strategy = tiny_strategy(name, world, precision="fp16")
    tiny_steps(strategy, world, first=0, count=1)
    before = [local_shard(p).clone() for p in strategy.method.parameters()]
    scale = strategy.loss_scale.value
    x = torch.full((2, 41), 1e30 if world.rank == world.size - 1 else 1.0)
    with strategy.accumulate(last=True):
        strategy.backward(strategy("learn", {"images": x}, None, {})["loss"])
    result = strategy.step()
    changed = sum(not torch.equal(a, local_shard(b)) for a, b in zip(before, strategy.method.parameters(), strict=True))
    return scale, strategy.loss_scale.value, result.taken, changed


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_non_finite_gradient_on_one_rank_stops_the_step_on_all(name):
    for scale, after, taken, changed in run_distributed(poisoned, 2, name):
        assert (after, taken, changed) == (scale / 2, False, 0)
