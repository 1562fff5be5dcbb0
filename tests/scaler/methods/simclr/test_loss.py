"""NT-Xent against a naive float64 formula, lightly's, and itself over 2 and 3 ranks; values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from torch import Tensor

from scaler.collectives import World
from scaler.methods.simclr.loss import nt_xent
from tests.distributed.helper import run_distributed
from tests.live_bytes import LiveBytes


def naive(embeddings: Tensor, temperature: float) -> Tensor:
    """The definition, anchor by anchor and key by key."""
    z = [e / e.norm() for e in embeddings]
    half = len(z) // 2
    terms = []
    for i in range(len(z)):
        scores = torch.stack([z[i] @ z[k] / temperature for k in range(len(z)) if k != i])
        terms.append(scores.exp().sum().log() - z[i] @ z[(i + half) % len(z)] / temperature)
    return torch.stack(terms).mean()


def random(m: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2 * m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_and_grad(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = f(x)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


@given(
    m=st.integers(2, 7),
    d=st.integers(2, 9),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.005, 0.05, 0.1, 0.5, 1.0, 20.0]),
    side=st.sampled_from([1, 2, 3, 5, None]),
)
@settings(max_examples=100, deadline=None)
def test_equals_the_definition_whatever_the_tiles(
    m: int, d: int, seed: int, temperature: float, side: int | None
) -> None:
    x = random(m, d, seed)
    expected = value_and_grad(lambda x: naive(x, temperature), x)
    got = value_and_grad(lambda x: nt_xent(x, temperature=temperature, world=World(), side=side).loss, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(got[0], nt_xent(x, temperature=temperature, world=World(), side=side).loss)


@given(seed=st.integers(0, 1000), m=st.integers(2, 40), temperature=st.sampled_from([0.1, 0.5]))
@settings(max_examples=100, deadline=None)
def test_equals_lightlys_in_fp32(seed: int, m: int, temperature: float) -> None:
    x = random(m, 32, seed, torch.float32)
    theirs = value_and_grad(lambda x: NTXentLoss(temperature)(*x.chunk(2)), x)
    ours = value_and_grad(lambda x: nt_xent(x, temperature=temperature, world=World()).loss, x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert (ours[1] - theirs[1]).norm() <= 1e-5 * theirs[1].norm()


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.005])  # the last one's exponentials overflow in fp32
def test_hard_cases_in_fp32(temperature: float) -> None:
    equal = torch.ones(16, 8)
    value, grad = value_and_grad(lambda x: nt_xent(x, temperature=temperature, world=World()).loss, equal)
    assert value.item() == pytest.approx(math.log(15), rel=1e-5) and grad.abs().max() < 1e-6
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 2)
    assert nt_xent(opposite * 1e-3, temperature=temperature, world=World()).loss.item() == pytest.approx(0, abs=1e-6)
    spread = random(64, 16, 0, torch.float32) * torch.logspace(-3, 3, 128)[:, None]
    pairs = spread[:64].repeat(2, 1) + 1e-4 * random(64, 16, 1, torch.float32)  # probabilities of almost 1
    twice = spread.view(2, 64, 16)[:, :32].repeat(1, 2, 1).flatten(0, 1)  # every image is there twice
    few = torch.eye(4).repeat(32, 4) + 1e-2 * random(64, 16, 2, torch.float32)  # many all but equal vectors
    for x in (spread, pairs, twice, few):
        exact = value_and_grad(lambda x: nt_xent(x, temperature=temperature, world=World()).loss, x.double())
        got = value_and_grad(lambda x: nt_xent(x, temperature=temperature, world=World()).loss, x)
        assert got[0].dtype == got[1].dtype == torch.float32
        assert got[0].item() == pytest.approx(exact[0].item(), rel=1e-5, abs=0)
        assert (got[1] - exact[1]).norm() <= 1e-5 * exact[1].norm()


def test_bfloat16_embeddings_are_computed_in_fp32() -> None:
    x = random(20, 32, 0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = nt_xent(x, temperature=0.1, world=World())
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, nt_xent(x.float(), temperature=0.1, world=World()).loss)


def test_metrics() -> None:
    z = torch.eye(4).repeat(2, 1)
    spread = nt_xent(z, temperature=0.1, world=World())
    assert spread.accuracy == 1
    collapsed = nt_xent(torch.ones(8, 4), temperature=0.1, world=World())
    assert collapsed.embedding_std < 1e-6 and collapsed.accuracy == 0
    uniform = nt_xent(random(5000, 16, 0, torch.float32), temperature=0.1, world=World())
    assert uniform.embedding_std.item() == pytest.approx(1.0, abs=0.02)
    swapped = torch.cat([torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]])
    assert nt_xent(swapped, temperature=0.1, world=World()).accuracy == 0.5


@pytest.mark.parametrize("n", [1024, 4096])
def test_memory_is_two_tiles_and_what_is_as_large_as_the_embeddings(n: int) -> None:
    x = random(n // 2, 8, 0, torch.float32).requires_grad_()
    with LiveBytes() as memory:
        nt_xent(x, temperature=0.1, world=World(), side=256).loss.backward()
    assert memory.peak < 4 * (2 * 256 * 256 + 12 * x.numel())


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 1 image has no negatives"):
        nt_xent(torch.ones(2, 3), temperature=0.1, world=World())
    with pytest.raises(ValueError, match=r"temperature 0\.001 is too low for NT-Xent of 4 embeddings; take 0\.002 or"):
        nt_xent(torch.ones(4, 3), temperature=0.001, world=World())


def on_ranks(world: World) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    results = []
    for dtype in (torch.float64, torch.float32):
        views = random(6, 8, 3, dtype).view(2, 6, 8)
        weight = random(4, 8, 4, dtype).requires_grad_()  # a parameter that every rank has
        size = 6 // world.size
        mine = views[:, size * world.rank : size * (world.rank + 1)].flatten(0, 1)
        result = nt_xent(mine @ weight.T, temperature=0.2, world=world)
        result.loss.backward()
        assert weight.grad is not None
        mean = [world.sum_(x.detach().clone()) / world.size for x in (result.loss, weight.grad, result.accuracy)]
        results.append((mean[0], mean[1], mean[2], result.embedding_std))
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_equal_one_process(ranks: int) -> None:
    expected = on_ranks(World())
    for result in run_distributed(on_ranks, ranks):
        torch.testing.assert_close(result[0], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-6)


def test_one_process_matches_naive_for_that_parameter() -> None:
    weight = random(4, 8, 4).requires_grad_()
    naive(random(6, 8, 3) @ weight.T, 0.2).backward()
    torch.testing.assert_close(on_ranks(World())[0][1], weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    x = random(200, 64, 0, torch.float32)
    on_cpu = value_and_grad(lambda x: nt_xent(x, temperature=0.1, world=World()).loss, x)
    value, grad = value_and_grad(lambda x: nt_xent(x, temperature=0.1, world=World()).loss, x.cuda())
    torch.testing.assert_close(value.cpu(), on_cpu[0], rtol=1e-5, atol=0)
    assert (grad.cpu() - on_cpu[1]).norm() <= 1e-5 * on_cpu[1].norm()
