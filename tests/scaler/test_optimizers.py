"""LARS against a naive float64 formula, lightly's, and itself on FSDP2 shards; groups and hyper values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.lars import LARS as LightlyLARS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scaler.collectives import World
from scaler.optimizers import LARS, build_optimizer, set_hyper
from scaler.recipe import Optim
from tests.distributed.helper import run_distributed


def naive_lars(
    w: Tensor, grads: list[Tensor], lrs: list[float], *, momentum: float, decay: float, eta: float, adapt: bool
) -> Tensor:
    w, v = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    for grad, lr in zip(grads, lrs, strict=True):
        g = grad.double() + decay * w
        weight_norm, grad_norm = float((w**2).sum()) ** 0.5, float((g**2).sum()) ** 0.5
        trust = eta * weight_norm / grad_norm if adapt and weight_norm > 0 and grad_norm > 0 else 1.0
        v = momentum * v + lr * trust * g
        w = w - v
    return w


@given(
    seed=st.integers(0, 10_000),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 1e-6, 0.1]),
    eta=st.sampled_from([0.001, 1.0]),
    adapt=st.booleans(),
    zero=st.sampled_from(["nothing", "weight", "grad"]),
)
@settings(max_examples=60, deadline=None)
def test_lars_follows_its_formula(seed: int, momentum: float, decay: float, eta: float, adapt: bool, zero: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(7, 3, generator=generator, dtype=torch.float64) * (zero != "weight")
    grads = [torch.randn(7, 3, generator=generator, dtype=torch.float64) * (zero != "grad") for _ in range(4)]
    lrs = [0.1, 0.4, 0.2, 0.0]
    w = nn.Parameter(start.clone())
    optimizer = LARS([{"params": [w], "adapt": adapt}], lr=1.0, momentum=momentum, weight_decay=decay, eta=eta)
    for grad, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = grad.clone()
        optimizer.step()
        assert torch.equal(w.grad, grad)  # gradients are left alone
    expected = naive_lars(start, grads, lrs, momentum=momentum, decay=decay, eta=eta, adapt=adapt)
    torch.testing.assert_close(w.detach(), expected, atol=1e-12, rtol=1e-12)
    assert optimizer.state[w]["momentum_buffer"].shape == w.shape


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_that_is_masked_on_the_device_leaves_everything_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    groups = [
        {"params": [p], "names": [n], "clip": "model", **({"adapt": n == "weight"} if name == "lars" else {})}
        for n, p in model.named_parameters()
    ]
    optimizer = build_optimizer(Optim(name=name, lr=0.1, momentum=0.9, weight_decay=0.1), groups)
    for found_inf in (0.0, 1.0, 0.0):
        before = copy.deepcopy([*model.parameters(), *optimizer.state.values()])
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan") if found_inf else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
        after = [*model.parameters(), *optimizer.state.values()]
        if found_inf:
            assert str(after) == str(before) and len(after) == 4
        else:
            assert str(after) != str(before)
        assert all(p.isfinite().all() for p in model.parameters())


def test_lars_equals_lightlys_where_the_conventions_meet() -> None:
    # at a constant lr, and at a weight decay too small to tell |g + d w| from |g| + d |w| (0 switches lightly's off)
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(20, 30, generator=generator))
    theirs = nn.Parameter(w.detach().clone())
    a = LARS([w], lr=0.3, momentum=0.9, weight_decay=1e-12, eta=0.02)
    b = LightlyLARS([theirs], lr=0.3, momentum=0.9, weight_decay=1e-12, trust_coefficient=0.02, eps=0.0)
    for _ in range(10):
        w.grad = torch.randn(20, 30, generator=generator)
        theirs.grad = w.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(w, theirs, atol=1e-6, rtol=1e-5)


def _model() -> nn.Module:
    torch.manual_seed(0)
    # first dimensions 5, 1 and 3 on 2 ranks: uneven shards and an empty one
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False), nn.Linear(1, 3))


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim <= 1]
    return [
        {"params": [p for _, p in matrices], "names": [n for n, _ in matrices], "clip": "model"},
        {"params": [p for _, p in vectors], "names": [n for n, _ in vectors], "clip": "model",
         "weight_decay_scale": 0.0, "adapt": False, "lr_scale": 0.5},
    ]  # fmt: skip


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, *, shard: slice) -> None:
    for step in range(4):
        set_hyper(optimizer, {"lr": 0.2 + 0.1 * step, "weight_decay": 0.01})
        optimizer.zero_grad()
        model(data[step, shard]).square().sum(1).mean().backward()
        optimizer.step()


def _sharded(world: World, name: str) -> dict[str, Tensor]:
    model = _model()
    mesh = init_device_mesh("cpu", (world.size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(Optim(name=name, lr=0.3, momentum=0.9, eta=0.1), _groups(model))
    data = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    part = 12 // world.size
    _train(model, optimizer, data, shard=slice(part * world.rank, part * (world.rank + 1)))
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if key != "step":
                assert isinstance(value, DTensor) and value.shape == p.shape and value.placements == p.placements
    return {n: p.full_tensor() for n, p in model.named_parameters()}


def _sharded_all(world: World) -> dict[str, dict[str, Tensor]]:
    return {name: _sharded(world, name) for name in ("lars", "sgd", "adamw")}


def test_on_fsdp2_shards_as_on_one_process() -> None:
    results = run_distributed(_sharded_all, 2)
    data = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    for name in ("lars", "sgd", "adamw"):
        model = _model()
        before = copy.deepcopy(model.state_dict())
        optimizer = build_optimizer(Optim(name=name, lr=0.3, momentum=0.9, eta=0.1), _groups(model))
        _train(model, optimizer, data, shard=slice(None))
        for key, p in model.named_parameters():
            assert (p - before[key]).norm() > 1e-3
            for result in results:
                torch.testing.assert_close(result[name][key], p.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_set_hyper_scales_by_group(name: str) -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "names": ["a"], "clip": "model"},
        {"params": [nn.Parameter(torch.ones(2))], "names": ["b"], "clip": "model", "lr_scale": 0.2,
         "weight_decay_scale": 0.0, "lr_key": "last_layer_lr"},
        {"params": [], "names": [], "clip": "model"},
    ]  # fmt: skip
    optimizer = build_optimizer(Optim(name=name, lr=3.0, weight_decay=0.5), groups)
    assert [group["names"] for group in optimizer.param_groups] == [["a"], ["b"]]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3.0, 0.6])
    set_hyper(optimizer, {"lr": 1.0, "last_layer_lr": 10.0, "weight_decay": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_settings_reach_the_optimiser() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "names": ["a"], "clip": "model"}]
    adamw = build_optimizer(Optim(name="adamw", lr=1.0, betas=(0.8, 0.95), eps=1e-6), groups).param_groups[0]
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.95), 1e-6)
    sgd = build_optimizer(Optim(name="sgd", lr=1.0, momentum=0.7), groups).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"]) == (0.7, False)
    lars = build_optimizer(Optim(name="lars", lr=1.0, momentum=0.7, eta=0.02), groups).param_groups[0]
    assert (lars["momentum"], lars["eta"], lars["adapt"]) == (0.7, 0.02, True)


def test_wrong_groups_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(Optim(lr=1.0), [{"params": [], "names": []}])
    with pytest.raises(ValueError, match="two optimiser groups"):
        build_optimizer(Optim(lr=1.0), [{"params": [p], "names": ["a"]}, {"params": [p], "names": ["b"]}])
    with pytest.raises(ValueError, match="LARS needs"):
        LARS([p], lr=0.1, momentum=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_cuda_gives_what_the_cpu_gives(name: str) -> None:
    data = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    weights = []
    for device in ("cpu", "cuda"):
        model = _model().to(device)
        optimizer = build_optimizer(Optim(name=name, lr=0.3, eta=0.1), _groups(model))
        _train(model, optimizer, data.to(device), shard=slice(None))
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
