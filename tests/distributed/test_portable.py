"""One checkpoint for every strategy: a run that changes strategy and world size at every stop is the run that does not.

And sharding is real: what lies on one of four ranks is measured from the live tensors.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from scaler.checkpoint import complete_checkpoints
from scaler.collectives import World
from scaler.optimizers import build_optimizer, set_hyper
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import strategy_class
from tests.distributed.helper import run_distributed
from tests.runs import make_shards, rows, train_job, weights, write_recipe
from tests.scaler.methods.dinov2.tiny import micro_batches, tiny_method

# 36 wide, 61 prototypes: most parameters divide neither by 2 nor by 3 ranks.
ROUTE = [("fsdp2", 2), ("zero3", 3), ("ddp", 1), ("zero1", 2), ("zero2", 3), ("fsdp2", 3)]


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Keys' biases have no gradient but rounding, which Adam makes as large as any other."""
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def test_a_run_that_moves_through_all_strategies_is_the_one_that_stays(tmp_path):
    shards = make_shards(tmp_path / "data")
    stayed = write_recipe(tmp_path / "stayed.yaml", "dinov2", shards=shards)
    moved = write_recipe(tmp_path / "moved.yaml", "dinov2", shards=shards)
    last = 3 * len(ROUTE)
    run_distributed(train_job, 1, str(stayed), ["strategy.name=ddp", f"run.stop_after={last} steps"])
    for stop, (name, ranks) in enumerate(ROUTE, start=1):
        overrides = [f"strategy.name={name}", f"run.stop_after={3 * stop} steps"]
        run_distributed(train_job, ranks, str(moved), overrides)

    mine, reference = rows(tmp_path / "moved"), rows(tmp_path / "stayed")
    assert [row["step"] for row in mine] == list(range(1, last + 1))
    for row, wanted in zip(mine, reference, strict=True):
        losses = {key: value for key, value in wanted.items() if key.startswith("loss")}
        assert {key: row[key] for key in losses} == pytest.approx(losses, rel=1e-5), wanted["step"]
        assert wanted["grad_norm"] > 0.1, "clipping must be active"

    saved, kept = (weights(complete_checkpoints(tmp_path / run / "checkpoints")[0]) for run in ("moved", "stayed"))
    assert saved.keys() == kept.keys()
    by_module: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, tensor in kept.items():
        if name.startswith("method/") and tensor.is_floating_point():
            a, b = without_key_bias(name, saved[name]).double(), without_key_bias(name, tensor).double()
            by_module[name.rpartition(".")[0]].append((float((a - b).square().sum()), float(b.square().sum())))
        if name.endswith("/step"):
            assert float(saved[name]) == float(tensor) == last
    assert len(by_module) > 50 and any("teacher" in name for name in by_module)
    for module, parts in by_module.items():
        difference, size = (sum(values) ** 0.5 for values in zip(*parts, strict=True))
        assert difference <= 1e-4 * size, (module, difference / size)


def bytes_on_this_rank(world: World, name: str) -> dict[str, int]:
    """Live bytes by part after a step of a DINOv2 that is large enough to tell."""
    sizes = {"embed_dim": 192, "num_heads": 3, "depth": 4, "head_hidden": 512, "num_prototypes": 2048}
    method = tiny_method(world, **sizes)
    values = StrategySettings(name=name, precision="fp32")
    strategy = strategy_class(name)(values, world=world, device=torch.device("cpu"), clip_norm=1.0, deterministic=False)
    strategy.prepare(method, lambda: build_optimizer(Optim(lr=1e-3), method.parameter_groups(Optim(lr=1e-3))))
    hyper = {"momentum": 0.9, "teacher_temperature": 0.06}
    set_hyper(strategy.optimizer, {"lr": 1e-3, "last_layer_lr": 1e-3, "weight_decay": 0.0})
    (batch,) = micro_batches(method, [4 * world.rank, 4 * world.rank + 4], step=0)
    (target,) = strategy("combine", [strategy("observe", batch, hyper)], hyper)
    with strategy.accumulate(last=True):
        strategy.backward(strategy("learn", batch, target, hyper)["loss"])
    assert strategy.step().taken
    method.after_step(hyper, strategy.lerp_)
    return strategy.memory()


def test_a_rank_of_four_holds_a_quarter():
    """Parameters, teacher and optimiser state; the gradients too, from ZeRO-2 on."""

    def kept(memory: dict[str, int]) -> int:
        return memory["parameters"] + memory["teacher"] + memory["optimizer"]

    (whole,) = run_distributed(bytes_on_this_rank, 1, "ddp")
    assert kept(whole) > 30 * 2**20 and whole["activations"] > 2**20
    assert 3.9 * whole["parameters"] < kept(whole) < 4.1 * whole["parameters"], "weights, teacher, two moments"
    for name in ("fsdp2", "zero3"):
        parts = run_distributed(bytes_on_this_rank, 4, name)
        assert max(kept(part) for part in parts) <= 0.3 * kept(whole)
        assert sum(kept(part) for part in parts) > 0.99 * kept(whole), "nothing is left out (but some step counts)"
        assert max(part["gradients"] for part in parts) <= 0.3 * whole["gradients"]
