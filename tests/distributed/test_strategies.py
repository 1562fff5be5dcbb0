"""Every strategy trains the same model: losses, clipping, accumulation, EMA, checkpointing, compile, fp16 scaling."""

from __future__ import annotations

import shutil

import pytest
import torch

from scaler.collectives import World
from scaler.recipe import StrategySettings
from scaler.strategies import STRATEGIES, strategy_class
from scaler.strategies.fsdp2 import shard_width
from tests.distributed.helper import run_distributed
from tests.long import only_long
from tests.tiny import tiny_steps, tiny_strategy


def run(world: World, name: str, micro_batches: int, optimizer: str, settings: dict) -> tuple[list[float], dict]:
    strategy = tiny_strategy(name, world, optimizer=optimizer, **settings)
    losses = tiny_steps(strategy, world, first=0, count=6, micro_batches=micro_batches)
    return losses, strategy.report()


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {optimizer: run_distributed(run, 1, "ddp", 1, optimizer, {})[0][0] for optimizer in ("adamw", "sgd", "lars")}


ZERO = [name for name in STRATEGIES if name.startswith("zero")]
SHARE = {"ddp": 1.0, "fsdp2": 0.6, "zero1": 1.0, "zero2": 1.0, "zero3": 0.6}  # of the parameters, at most, on one of 2


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "optimizer", "settings"),
    [
        (1, 2, "adamw", {}),
        (2, 1, "adamw", {}),
        (2, 3, "adamw", {"activation_checkpointing": "selective"}),
        (3, 2, "lars", {"activation_checkpointing": 1}),
        (3, 1, "sgd", {"activation_checkpointing": "blocks"}),
    ],
)
def test_losses_do_not_depend_on_the_strategy(reference, name, ranks, micro_batches, optimizer, settings):
    if optimizer == "lars" and name in ZERO:
        with pytest.raises(RuntimeError, match=r"ValueError: lars needs the norm of every whole parameter.*fsdp2"):
            run_distributed(run, ranks, name, micro_batches, optimizer, settings)
        return
    for losses, report in run_distributed(run, ranks, name, micro_batches, optimizer, settings):
        assert losses == pytest.approx(reference[optimizer], rel=2e-6)
        assert report["strategy"] == name and report["ranks"] == ranks
        assert (report["sharded"] == "nothing") == (name == "ddp")
        if ranks > 1:
            share = report["parameters_on_rank_0"] / report["parameters"]
            assert share <= SHARE[name] and (share == 1.0) == (SHARE[name] == 1.0)


@pytest.mark.parametrize(
    ("name", "ranks", "settings", "said"),
    [
        ("ddp", 2, {"compile": True, "activation_checkpointing": "selective"}, "nothing"),
        pytest.param("zero3", 2, {"compile": True}, "teacher over 2 ranks", marks=only_long),
        (
            "fsdp2",
            2,
            {"reshard_after_forward": False, "compile": True, "activation_checkpointing": "selective"},
            "over 2 ranks",
        ),
        ("fsdp2", 4, {"shard_group": 2}, "over 2 ranks, 2 copies"),
        ("fsdp2", 3, {"shard_group": 1}, "over 1 ranks, 3 copies"),
        ("ddp", 2, {"static_graph": True, "deterministic": False}, "nothing"),
        (
            "zero2",
            2,
            {"deepspeed_config": {"zero_optimization": {"overlap_comm": True}}},
            "optimizer, gradients over 2 ranks",
        ),
        ("zero3", 2, {"deepspeed_config": {"zero_optimization": {"sub_group_size": 100}}}, "teacher over 2 ranks"),
    ],
)
def test_policies_change_no_result(reference, name, ranks, settings, said):
    for losses, report in run_distributed(run, ranks, name, 3 if name == "zero2" else 1, "adamw", settings):
        assert losses == pytest.approx(reference["adamw"], rel=2e-6)
        assert said in report["sharded"]


@only_long
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_offload_to_the_host_steps_with_deepspeeds_cpu_adam(reference, name):
    """Its C++ is built at first use, for minutes; without a compiler there is nothing to test."""
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's CPU Adam needs g++")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    for losses, report in run_distributed(run, 2, name, 2, "adamw", {"deepspeed_config": offload}):
        assert losses == pytest.approx(reference["adamw"], rel=5e-6)
        assert report["optimizer"].endswith("over DeepSpeedCPUAdam")


def test_fsdp2_offload_to_the_host(reference):
    if not torch.cuda.is_available():
        pytest.skip("offloading moves shards from a GPU to the host: no CUDA device here")
    for losses, _ in run_distributed(run, 2, "fsdp2", 1, "adamw", {"cpu_offload": True}):
        assert losses == pytest.approx(reference["adamw"], rel=2e-6)


@pytest.mark.parametrize("group", [2, 4])
def test_a_shard_group_divides_the_ranks(group):
    with pytest.raises(ValueError, match=rf"shard_group is {group} ranks, which does not divide 3 ranks; valid: 1, 3,"):
        shard_width(group, world_size=3)


def test_a_static_graph_does_not_go_with_accumulation():
    with pytest.raises(RuntimeError, match="static_graph does not go with accumulation"):
        run_distributed(run, 2, "ddp", 2, "adamw", {"static_graph": True, "deterministic": False})


def test_a_static_graph_would_rebuild_the_buckets_of_a_deterministic_run():
    with pytest.raises(ValueError, match=r"static_graph rebuilds DDP's buckets"):
        tiny_strategy("ddp", World(), static_graph=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ddp", {"shard_group": 2}), ("fsdp2", {"static_graph": True}), ("ddp", {"deepspeed_config": {}})],
)
def test_a_setting_of_another_strategy_warns(name, settings):
    values = StrategySettings(name=name, precision="fp32", **settings)
    with pytest.warns(UserWarning, match=rf"strategy.{next(iter(settings))} has no effect under {name}"):
        strategy_class(name)(values, world=World(), device=torch.device("cpu"), clip_norm=None, deterministic=False)


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
def test_mixed_precision_follows_fp32(reference, name, precision, tolerance):
    for losses, report in run_distributed(run, 2, name, 2, "adamw", {"precision": precision}):
        assert losses == pytest.approx(reference["adamw"], rel=tolerance)
        assert losses != reference["adamw"] and report["precision"] == precision


def test_gradients_may_travel_in_bf16_under_fsdp2(reference):
    exact, rounded = (
        run_distributed(run, 2, "fsdp2", 1, "adamw", {"precision": "bf16", "reduce_precision": precision})[0][0]
        for precision in ("fp32", "bf16")
    )
    assert rounded == pytest.approx(reference["adamw"], rel=2e-2) and rounded != exact


def poisoned(world: World, name: str) -> tuple[float, float, float, int]:
    """One good step, then one whose gradient is infinite on the last rank only."""
    strategy = tiny_strategy(name, world, precision="fp16")
    tiny_steps(strategy, world, first=0, count=1)
    before = [strategy.local(p).clone() for p in strategy.method.parameters()]
    scale = strategy.loss_scale.value
    x = torch.full((2, 41), 1e30 if world.rank == world.size - 1 else 1.0)
    with strategy.accumulate(last=True):
        strategy.backward(strategy("learn", {"images": x}, None, {})["loss"])
    result = strategy.step()
    changed = sum(
        not torch.equal(a, strategy.local(b)) for a, b in zip(before, strategy.method.parameters(), strict=True)
    )
    return scale, strategy.loss_scale.value, result.taken, changed


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_non_finite_gradient_on_one_rank_stops_the_step_on_all(name):
    for scale, after, taken, changed in run_distributed(poisoned, 2, name):
        assert (after, taken, changed) == (scale / 2, False, 0)
