"""Global batch norm on 2 and 3 ranks against torch's on the concatenated batch, values, gradients and statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaler.collectives import World
from scaler.nn.batch_norm import GlobalBatchNorm, _ByKernels, convert_batch_norm, frozen_statistics, has_batch_norm
from tests.distributed.helper import run_distributed
from tests.fake_cuda import fake_cuda

C = 5


def model(kind: str) -> nn.Module:
    """Batch norms between mixing layers, with affine parameters and running statistics away from their defaults."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "1d": nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C), nn.BatchNorm1d(C)),
        "1d no affine": nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C, affine=False, momentum=0.3)),
        "2d": nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C, eps=1e-3), nn.Tanh(), nn.Conv2d(C, C, 1)),
        "timm": nn.Sequential(nn.Conv2d(C, C, 3), BatchNormAct2d(C, act_layer=nn.SiLU), nn.Conv2d(C, C, 1)),
        "timm relu": nn.Sequential(nn.Conv2d(C, C, 3), BatchNormAct2d(C), nn.Conv2d(C, C, 1)),
        "cumulative": nn.Sequential(nn.BatchNorm1d(C, momentum=None)),
        "untracked": nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False)),
    }
    net = layers[kind]
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0)
    return net


KINDS = ("1d", "1d no affine", "2d", "timm", "timm relu", "cumulative", "untracked")


def batches(kind: str, dtype: torch.dtype, shift: float) -> Tensor:
    """Two batches of 12 whose images differ in scale and mean, so that every rank's statistics differ."""
    g = torch.Generator().manual_seed(1)
    shape = (2, 12, C) if kind not in ("2d", "timm", "timm relu") else (2, 12, C, 6, 5)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    weight = torch.linspace(0.2, 3, 12, dtype=torch.float64).view(1, 12, *[1] * (x.ndim - 2))
    return (x * weight + weight.sqrt() + shift).to(dtype)


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two training passes (statistics move twice), a loss that is a mean over images; outputs and input gradient."""
    with torch.no_grad():
        net(x[0])
    inputs = x[1].clone().requires_grad_()
    y = net(inputs)
    target = torch.sin(torch.arange(y[0].numel(), dtype=torch.float64)).view(y[0].shape).to(y.dtype)
    ((y * target).flatten(1).sum(1) + (y**3).flatten(1).mean(1)).mean().backward()
    assert inputs.grad is not None
    return y.detach(), inputs.grad


def on_ranks(world: World) -> dict[str, Any]:
    """All that the distributed tests look at, in one start of the processes."""
    return {"kinds": _kinds(world), "fp32": _in_fp32(world), "half": _half(world), "frozen": _freeze(world)}


def _kinds(world: World) -> list[dict[str, Any]]:
    results = []
    for kind in KINDS:
        net = convert_batch_norm(model(kind).double(), world)
        assert any(isinstance(m, GlobalBatchNorm) for m in net.modules())
        size = 12 // world.size
        x = batches(kind, torch.float64, 0.0)
        y, grad = step(net, x[:, size * world.rank : size * (world.rank + 1)])
        for p in net.parameters():
            assert p.grad is not None
            world.sum_(p.grad).div_(world.size)  # what DDP does
        results.append(
            {
                "y": y,
                "grad": grad / world.size,
                "grads": {n: p.grad for n, p in net.named_parameters()},
                "buffers": dict(net.named_buffers()),
                "eval": net.eval()(x[0]),
            }
        )
    return results


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_distributed(on_ranks, request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_on_the_concatenated_batch(ranks: list[dict[str, Any]], kind: str) -> None:
    results = [rank["kinds"][KINDS.index(kind)] for rank in ranks]
    x = batches(kind, torch.float64, 0.0)
    net = model(kind).double()
    y, grad = step(net, x)
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y, **close)
    torch.testing.assert_close(torch.cat([r["grad"] for r in results]), grad, **close)
    buffers = dict(net.named_buffers())
    for result in results:
        torch.testing.assert_close(result["grads"], {n: p.grad for n, p in net.named_parameters()}, **close)
        assert result["buffers"].keys() == buffers.keys()
        torch.testing.assert_close(result["buffers"], buffers, **close)
        if kind != "untracked":
            torch.testing.assert_close(result["eval"], net.eval()(x[0]), **close)


def _in_fp32(world: World) -> Tensor:
    """fp32 with a mean a thousand times the deviation, where E[x²] − E[x]² would leave few digits."""
    x = batches("1d", torch.float64, 1000.0)[0]
    part = x[12 // world.size * world.rank :][: 12 // world.size]
    layer = GlobalBatchNorm(C, world=world).train()
    layer(part.float())
    assert layer.running_var is not None
    return layer.running_var


def test_a_large_mean_costs_no_digits(ranks: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm1d(C).double()
    expected(batches("1d", torch.float64, 1000.0)[0])
    for rank in ranks:
        variance = rank["fp32"]
        torch.testing.assert_close(variance.double(), expected.running_var, rtol=1e-4, atol=0)


def _half(world: World) -> tuple[Tensor, Tensor]:
    x = batches("1d", torch.float32, 0.0)[0].bfloat16()
    size = 12 // world.size
    x = x[size * world.rank : size * (world.rank + 1)].requires_grad_()
    y = GlobalBatchNorm(C, world=world)(x)
    (y.float() ** 3).sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None
    return y, x.grad


def test_half_precision_keeps_fp32_statistics(ranks: list[dict[str, Any]]) -> None:
    ys, grads = zip(*[rank["half"] for rank in ranks], strict=True)
    x = batches("1d", torch.float32, 0.0)[0].bfloat16().float().requires_grad_()
    y = nn.BatchNorm1d(C)(x)
    (y**3).sum().backward()
    torch.testing.assert_close(torch.cat(ys).float(), y.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.cat(grads).float(), x.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_torch_bit_for_bit(kind: str) -> None:
    net, other = model(kind), convert_batch_norm(copy.deepcopy(model(kind)), World())
    x = batches(kind, torch.float32, 0.0)
    for a, b in zip(step(net, x), step(other, x), strict=True):
        assert torch.equal(a, b)
    assert net.state_dict().keys() == other.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    if kind != "untracked":
        assert torch.equal(net.eval()(x[0]), other.eval()(x[0]))


def test_conversion_keeps_tensors_and_names() -> None:
    net = model("timm")
    before = {n: p.data_ptr() for n, p in [*net.named_parameters(), *net.named_buffers()]}
    assert convert_batch_norm(net, World()) is net
    assert {n: p.data_ptr() for n, p in [*net.named_parameters(), *net.named_buffers()]} == before
    layer = convert_batch_norm(nn.BatchNorm1d(3), World())
    assert isinstance(layer, GlobalBatchNorm) and has_batch_norm(nn.Sequential(layer))
    assert not has_batch_norm(nn.Sequential(nn.LayerNorm(3)))


def test_a_norm_without_batch_statistics_is_left_alone() -> None:
    layer = FrozenBatchNormAct2d(3)
    assert convert_batch_norm(nn.Sequential(layer), World())[0] is layer  # type: ignore[index]


def test_unknown_kinds_and_single_values_are_refused() -> None:
    class Strange(nn.BatchNorm1d):
        pass

    with pytest.raises(ValueError, match="Strange cannot be made global"):
        convert_batch_norm(nn.Sequential(Strange(3)), World())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GlobalBatchNorm(3, world=World())(torch.randn(1, 3))


def _freeze(world: World) -> list[Tensor]:
    net = nn.Sequential(GlobalBatchNorm(C, world=world))
    x = batches("1d", torch.float32, 0.0)[0][world.rank :: world.size]
    with frozen_statistics(net):
        inside = net(x)
    between = copy.deepcopy(net.state_dict())
    outside = net(x)
    assert torch.equal(inside, outside)
    return [between["0.running_mean"], between["0.num_batches_tracked"], net[0].num_batches_tracked]


def test_frozen_statistics_stay(ranks: list[dict[str, Any]]) -> None:
    for mean, count_inside, count_after in [_freeze(World()), *(rank["frozen"] for rank in ranks)]:
        assert (mean == 0).all() and count_inside == 0 and count_after == 1


@pytest.mark.parametrize("kind", ["1d", "2d", "cumulative"])
def test_checkpointing_counts_a_batch_once(kind: str) -> None:
    nets = [convert_batch_norm(model(kind), World()) for _ in range(2)]
    x = batches(kind, torch.float32, 0.0)[0].requires_grad_()
    nets[0](x).sum().backward()
    checkpoint(nets[1], x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(dict(nets[1].named_buffers()), dict(nets[0].named_buffers()), rtol=0, atol=0)


def test_bfloat16_parameters_as_fsdp2_makes_them() -> None:
    layer = GlobalBatchNorm(C, world=World(), bias=False)
    assert layer.weight is not None
    layer.weight.data = layer.weight.data.bfloat16()
    x = batches("1d", torch.float32, 0.0)[0].bfloat16()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == layer.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert layer.running_var is not None and layer.running_var.dtype == torch.float32
    assert layer.eval()(x).dtype == torch.bfloat16


def test_without_bias() -> None:
    layer = GlobalBatchNorm(C, world=World(), bias=False)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    x = batches("1d", torch.float32, 0.0)[0]
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(C)(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_what_the_cpu_gives(kind: str) -> None:
    x = batches(kind, torch.float32, 0.0)
    on_cpu = step(convert_batch_norm(model(kind), World()), x)
    on_cuda = step(convert_batch_norm(model(kind), World()).cuda(), x.cuda())
    for a, b in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- torch's kernels on a GPU

SHAPES = [(12, C), (12, C, 7), (12, C, 6, 5)]


def by_kernels(x: Tensor, buffers: list[Tensor], affine: list[Tensor | None]) -> Tensor:
    y: Tensor = _ByKernels.apply(x, *affine, *buffers, 0.3, 1e-5, World())
    return y


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_torchs_batch_norm(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    if channels_last and len(shape) != 4:
        return
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 2).to("cuda", dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    found = []
    for normalise in (by_kernels, None):
        inputs, affine = x.clone().requires_grad_(), [torch.full((C,), v, device="cuda") for v in (1.5, 0.5)]
        buffers = [torch.zeros(C, device="cuda"), torch.ones(C, device="cuda")]
        for parameter in affine:
            parameter.requires_grad_()
        if normalise is not None:
            y = normalise(inputs, buffers, affine)
            assert y.dtype == dtype and y.stride() == x.stride()
        else:
            y = F.batch_norm(inputs.float(), *buffers, *affine, training=True, momentum=0.3)
        (y.float() ** 3).sum().backward()
        found.append([y.float(), inputs.grad.float(), *(p.grad for p in affine), *buffers])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for mine, wanted in zip(*found, strict=True):
        assert float((mine - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [False, True])
def test_kernels_wait_for_nothing_and_keep_type_and_memory(monkeypatch, shape: tuple[int, ...], affine: bool) -> None:
    with kernels_on_fakes(), fake_cuda(monkeypatch) as gpu:
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
        inputs = x.detach().requires_grad_()
        parameters = [torch.empty(C, device="cuda", requires_grad=True) if affine else None for _ in range(2)]
        buffers = [torch.empty(C, device="cuda") for _ in range(2)]
        y = by_kernels(inputs, buffers, parameters)
        (y.float() ** 3).sum().backward()
        assert gpu.waits == []
    assert inputs.grad is not None
    for tensor in (y, inputs.grad):
        assert (tensor.dtype, tensor.stride()) == (x.dtype, x.stride())
    assert all(p is None or p.grad.shape == (C,) for p in parameters)  # type: ignore[union-attr]


@contextlib.contextmanager
def kernels_on_fakes() -> Iterator[None]:
    """The shapes of what torch's kernels give, which torch has for real GPUs only."""

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        return values, values.clone()

    fakes = {
        "stats": lambda x, eps: pair(x),
        "gather_stats_with_counts": lambda x, *_: pair(x),
        "elemt": lambda x, *_: torch.empty_like(x),
        "backward_reduce": lambda g, x, *_: (*pair(x), *pair(x)),
        "backward_elemt": lambda g, x, *_: torch.empty_like(x),
    }
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, fake in fakes.items():
            library.impl(f"batch_norm_{name}", fake, "Meta")
        yield
