"""SimCLR as a method: the same global loss and gradient on every layout, optimiser groups, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scaler.collectives import World
from scaler.methods.simclr.loss import nt_xent
from scaler.methods.simclr.method import SimCLR
from scaler.nn.batch_norm import GlobalBatchNorm
from scaler.optimizers import build_optimizer
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import strategy_class
from tests.distributed.helper import run_distributed
from tests.scaler.methods.simclr.batches import RESNET, VIT, make_batch, make_method

Result = tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Tensor]]  # gradients, metrics, buffers

CASES: dict[str, dict[str, Any]] = {
    "vit": {**VIT},
    # three blocks, since class tokens that skip attention in all blocks are equal, and ties make accuracy jump
    "vit, drop path": {**VIT, "depth": 3, "head_layers": 2, "head_hidden": 40, "drop_path": 0.3, "group_size": 2},
    "vit, moco-v3, no batch norm": {
        **VIT, "head_batch_norm": False, "frozen_patch_embed": True, "sincos_positions": True,
        "initial_weights": "moco_v3",
    },
    "resnet": {**RESNET},
}  # fmt: skip


def one_step(world: World, case: str, strategy_name: str, num_micro_batches: int, precision: str = "fp32") -> Result:
    """What the loop does up to the optimiser, with the real strategies."""
    settings = StrategySettings(name=strategy_name, precision=precision)
    strategy = strategy_class(strategy_name)(
        settings, world=world, device=torch.device("cpu"), clip_norm=None, deterministic=False
    )
    method = make_method(world, **CASES[case])
    optim = Optim(name="sgd", lr=0.1)
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    size = 12 // world.size // num_micro_batches
    starts = range(12 // world.size * world.rank, 12 // world.size * (world.rank + 1), size)
    batches = [method.augment(make_batch(range(start, start + size)), seed=1, step=0) for start in starts]
    method.check_layout(num_micro_batches=len(batches), micro_batch_size=size)
    targets: list[Any] = [None] * len(batches)
    if method.observes(len(batches)):
        targets = strategy("combine", [strategy("observe", batch, {}) for batch in batches], {})
    metrics = []
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        with strategy.accumulate(last=i == len(batches) - 1):
            out = strategy("learn", batch, target, {})
            strategy.backward(out["loss"] / len(batches))
        metrics.append({name: float(value) for name, value in out["metrics"].items()})
    grads = {}
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            grads[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return grads, metrics, dict(method.named_buffers())


def many_steps(world: World, jobs: list[tuple[Any, ...]]) -> list[Result]:
    return [one_step(world, *job) for job in jobs]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    left, right = (torch.cat([x[name].flatten().double() for name in sorted(x)]) for x in (a, b))
    return float((left - right).norm() / right.norm())


def assert_same_step(results: list[Result], expected: Result, tolerance: float = 1e-5) -> None:
    """All ranks agree with the single process: gradients, the mean of what is logged, running statistics."""
    for grads, _, buffers in results:
        assert difference(grads, expected[0]) <= tolerance
        torch.testing.assert_close(buffers, expected[2], rtol=1e-4, atol=1e-5)
    rows = [row for _, metrics, _ in results for row in metrics]
    for name, value in expected[1][0].items():
        assert sum(row[name] for row in rows) / len(rows) == pytest.approx(value, rel=1e-5), name


def reference(case: str) -> Result:
    """The whole batch at once, without strategy, caching or gathering: plain autograd on the definition."""
    method = make_method(**CASES[case])
    batch = method.augment(make_batch(range(12)), seed=1, step=0)
    keep = None if batch["keep"] is None else [batch["keep"]]
    z = method.head(method.backbone([batch["images"]], keep=keep)[0].cls)
    z = nn.functional.normalize(z)
    scores = (z @ z.T / 0.2).masked_fill(torch.eye(24, dtype=torch.bool), -torch.inf)
    positives = torch.arange(24).roll(12)
    loss = nn.functional.cross_entropy(scores, positives)
    loss.backward()
    accuracy = (scores.argmax(1) == positives).float().mean()
    std = z.detach().std(0, correction=0).mean() * 4  # √16 channels
    value = loss.detach()
    metrics = {"loss": value, "loss/ntxent": value, "accuracy": accuracy, "embedding_std": std}
    grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return grads, [{name: float(value) for name, value in metrics.items()}], dict(method.named_buffers())


@pytest.mark.parametrize("case", CASES)
def test_one_micro_batch_is_plain_autograd(case: str) -> None:
    assert_same_step([one_step(World(), case, "ddp", 1)], reference(case))


@pytest.mark.parametrize("case", [case for case in CASES if case != "resnet"])
@pytest.mark.parametrize("num_micro_batches", [2, 3, 6])
def test_accumulation_changes_nothing(case: str, num_micro_batches: int) -> None:
    assert_same_step([one_step(World(), case, "ddp", num_micro_batches)], reference(case))


def test_ranks_and_accumulation_change_nothing() -> None:
    jobs = [(case, "ddp", 1) for case in CASES]
    jobs += [("vit, drop path", name, k) for name in ("ddp", "fsdp2") for k in (1, 3)]
    jobs += [("vit, moco-v3, no batch norm", "fsdp2", 2), ("resnet", "fsdp2", 1)]
    results = run_distributed(many_steps, 2, jobs)
    for i, job in enumerate(jobs):
        assert_same_step([rank[i] for rank in results], reference(job[0]))


def test_three_ranks_change_nothing() -> None:
    jobs = [("vit", "ddp", 2), ("resnet", "fsdp2", 1)]
    results = run_distributed(many_steps, 3, jobs)
    for i, job in enumerate(jobs):
        assert_same_step([rank[i] for rank in results], reference(job[0]))


def test_bfloat16_accumulation_stays_close() -> None:
    whole = one_step(World(), "vit", "ddp", 1, "bf16")
    parts = one_step(World(), "vit", "ddp", 3, "bf16")
    assert difference(parts[0], whole[0]) < 0.05
    assert parts[1][0]["loss"] == pytest.approx(whole[1][0]["loss"], rel=1e-2)


def test_the_last_micro_batch_alone_updates_running_statistics() -> None:
    _, _, buffers = one_step(World(), "vit", "ddp", 3)
    counts = [value for name, value in buffers.items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 3 and all(count == 1 for count in counts)


def test_training_lowers_the_loss() -> None:
    for case, optim in (("vit", Optim(name="adamw", lr=2e-3)), ("resnet", Optim(name="lars", lr=0.25, eta=0.02))):
        method = make_method(**CASES[case])
        optimizer = build_optimizer(optim, method.parameter_groups(optim))
        losses = []
        for step in range(15):
            out = method("learn", method.augment(make_batch(range(12)), seed=1, step=step), None, {})
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            losses.append(float(out["metrics"]["loss"]))
        assert losses[-1] < 0.8 * losses[0]


def test_a_backbone_with_batch_norm_refuses_accumulation() -> None:
    method = make_method(**RESNET)
    method.check_layout(num_micro_batches=1, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"test_resnet has batch norm.*strategy.micro_batch_size to 12"):
        method.check_layout(num_micro_batches=3, micro_batch_size=4)
    assert any(isinstance(m, GlobalBatchNorm) for m in method.backbone.modules())


def test_a_micro_batch_holds_whole_groups() -> None:
    method = make_method(**VIT, drop_path=0.1, group_size=4)
    method.check_layout(num_micro_batches=3, micro_batch_size=8)
    with pytest.raises(ValueError, match="micro-batch of 6 images does not hold whole groups of 4"):
        method.check_layout(num_micro_batches=2, micro_batch_size=6)
    make_method(**VIT, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)


def test_optimiser_groups() -> None:
    method = make_method(**CASES["vit, moco-v3, no batch norm"])
    decayed, plain = method.parameter_groups(Optim(lr=1.0))
    assert (decayed["weight_decay_scale"], decayed["adapt"], decayed["clip"]) == (1.0, True, "model")
    assert (plain["weight_decay_scale"], plain["adapt"], plain["clip"]) == (0.0, False, "model")
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert set(decayed["names"]) | set(plain["names"]) == trained
    assert len(decayed["names"]) + len(plain["names"]) == len(trained) == len({*decayed["names"], *plain["names"]})
    names = dict(method.named_parameters())
    for group in (decayed, plain):
        assert all(names[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    assert "backbone.blocks.0.attn.qkv.weight" in decayed["names"] and "head.layers.0.weight" in decayed["names"]
    assert {"backbone.cls_token", "backbone.norm.weight", "backbone.blocks.0.mlp.fc1.bias"} <= set(plain["names"])
    frozen = set(names) - trained
    assert frozen == {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    resnet = make_method(**RESNET).parameter_groups(Optim(lr=1.0))[1]
    assert any("bn1.weight" in n for n in resnet["names"]) and "head.layers.1.weight" in resnet["names"]


def test_the_backbone_may_have_an_average_and_learning_rates_by_layer() -> None:
    """As supervised training, whose tests hold the details; the head is not evaluated and so has no average."""
    method = make_method(**VIT, ema=0.9)
    assert method.average is not None and list(method.average) == ["backbone"]
    assert method.evaluated("backbone") is method.average["backbone"] is not method.backbone
    groups = method.parameter_groups(Optim(lr=1.0, layer_decay=0.5))
    rates = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert rates["head.layers.0.weight"] == rates["backbone.norm.weight"] == 1.0
    assert rates["backbone.blocks.0.attn.qkv.weight"] == 0.5 ** len(method.backbone.blocks())


def test_settings_shape_the_model() -> None:
    method = make_method(**{**RESNET, "backbone": "resnet18"}, small_stem=True, head_layers=2, head_hidden=64)
    assert method.backbone.model.conv1.stride == (1, 1)  # type: ignore[union-attr]
    assert method.backbone.model.forward_features(torch.zeros(2, 3, 16, 16)).shape == (2, 512, 2, 2)
    shapes = [tuple(m.weight.shape) for m in method.head.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(64, 512), (16, 64)]
    assert method.features(torch.zeros(2, 3, 16, 16)).shape == (2, 512)
    assert SimCLR.Settings().head_layers == 3


def test_temperature_counts() -> None:
    batch = make_method(**VIT).augment(make_batch(range(12)), seed=1, step=0)
    cold, warm = (
        float(make_method(**{**VIT, "temperature": t})("learn", batch, None, {})["metrics"]["loss"]) for t in (0.1, 1.0)
    )
    method = make_method(**VIT)
    z = method.head(method.features(batch["images"]))
    assert warm == pytest.approx(nt_xent(z, temperature=1.0, world=World()).loss.item(), rel=1e-5)
    assert abs(cold - warm) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**RESNET, "frozen_patch_embed": True}, "no plain ViT and has no method.frozen_patch_embed"),
        ({**RESNET, "initial_weights": "moco_v3"}, "method.initial_weights"),
        ({**VIT, "small_stem": True}, "small_stem is for timm's ResNets"),
        ({**VIT, "blur_kernel": 4}, "must be odd"),
        ({**VIT, "crop_scale": (0.5, 0.1)}, "0 < low <= high"),
        ({**VIT, "backbone": "resnet5o"}, "did you mean"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(**settings)


def test_foreign_drop_path_warns() -> None:
    with pytest.warns(UserWarning, match="draws its drop path per process"):
        make_method(**{**RESNET, "drop_path": 0.1})
