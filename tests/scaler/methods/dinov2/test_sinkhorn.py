"""Sinkhorn-Knopp by one scaling per prototype, against the alternating normalisations written out."""

from __future__ import annotations

import pytest
import torch
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor

from scaler.collectives import World
from scaler.methods.dinov2.sinkhorn import sinkhorn_log_scaling
from tests.distributed.helper import run_distributed
from tests.live_bytes import LiveBytes


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def probabilities(z: Tensor, prototypes: Tensor, shift: Tensor, temperature: float) -> Tensor:
    return (z @ prototypes.T / temperature + shift).softmax(dim=1)


def naive(scores: Tensor, temperature: float, num_iterations: int) -> Tensor:
    """Alternate equal prototype sums and equal sample sums on the whole matrix [n, K]."""
    q = torch.exp(scores / temperature)
    q = q / q.sum()
    n, k = q.shape
    for _ in range(num_iterations):
        q = q / q.sum(dim=0, keepdim=True) / k
        q = q / q.sum(dim=1, keepdim=True) / n
    return q * n


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", range(10))
def test_equals_alternating_normalisation(seed: int, num_iterations: int) -> None:
    torch.manual_seed(seed)
    z, prototypes = unit(37, 8), 1.3 * unit(23, 8)
    shift = sinkhorn_log_scaling(
        [z[:10], z[10:10], z[10:]],
        prototypes,
        temperature=0.05,
        world=World(),
        num_iterations=num_iterations,
        tile_elements=23 * 4,
    )
    actual = probabilities(z, prototypes, shift, 0.05)
    torch.testing.assert_close(actual, naive(z @ prototypes.T, 0.05, num_iterations), rtol=1e-10, atol=1e-300)


def test_equals_lightly() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        n, k = 20 + seed, 10 + 2 * seed
        z, prototypes = unit(n, 16), unit(k, 16)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            scores = (z @ prototypes.T).to(dtype)
            shift = sinkhorn_log_scaling([z.to(dtype)], prototypes.to(dtype), temperature=0.06, world=World())
            actual = probabilities(z.to(dtype), prototypes.to(dtype), shift, 0.06)
            expected = sinkhorn(scores, iterations=3, epsilon=0.06)
            assert (actual - expected).norm() < tolerance * expected.norm()


def test_huge_scores_stay_finite_where_exponentials_overflow() -> None:
    torch.manual_seed(0)
    z, prototypes = unit(20, 8).float(), 400 * unit(12, 8).float()
    assert not torch.exp(z @ prototypes.T / 0.04).isfinite().all()
    shift = sinkhorn_log_scaling([z], prototypes, temperature=0.04, world=World())
    actual = probabilities(z, prototypes, shift, 0.04)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual.sum(dim=1), torch.ones(20))


def test_no_samples_anywhere_give_zeros() -> None:
    shift = sinkhorn_log_scaling([torch.zeros(0, 8)], unit(12, 8).float(), temperature=0.04, world=World())
    assert torch.equal(shift, torch.zeros(12))


@pytest.mark.parametrize("n", [500, 2000])
def test_memory_is_the_budgets(n: int) -> None:
    z, prototypes, budget = unit(n, 16), unit(3000, 16), 1 << 17
    with LiveBytes() as memory:
        sinkhorn_log_scaling([z], prototypes, temperature=0.05, world=World(), tile_elements=budget)
    assert memory.peak < 8 * (budget + 2 * prototypes.numel())


def job(world: World, z: Tensor, prototypes: Tensor, cuts: list[int]) -> Tensor:
    mine = z[cuts[world.rank] : cuts[world.rank + 1]]
    return sinkhorn_log_scaling([mine[:3], mine[3:]], prototypes, temperature=0.05, world=world, tile_elements=100)


def test_ranks_agree_with_one_process_also_when_one_has_no_samples() -> None:
    torch.manual_seed(0)
    z, prototypes = unit(29, 8), unit(23, 8)
    expected = sinkhorn_log_scaling([z], prototypes, temperature=0.05, world=World())
    results = run_distributed(job, 3, z, prototypes, [0, 11, 11, 29])
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("temperature", [0.07, 0.04])
def test_scores_of_fp16_factors_give_better_targets_than_a_half_precision_heads_scores(temperature: float) -> None:
    """What a GPU computes in bf16 runs, rounded here, against float64: mean Kullback-Leibler divergence of targets."""
    torch.manual_seed(0)
    z, prototypes = unit(256, 256), unit(4096, 256)
    exact = naive(z @ prototypes.T, temperature, 3)

    def divergence(scores: Tensor) -> float:
        q = naive(scores.double(), temperature, 3)
        return float((exact * (exact.log() - q.log())).sum(dim=1).mean())

    ours = (z / temperature).half().float() @ prototypes.half().float().T * temperature
    fp16 = (z.half().float() @ prototypes.half().float().T).half()
    bf16 = (z.bfloat16().float() @ prototypes.bfloat16().float().T).bfloat16()
    assert divergence(ours) < min(1e-6, 1.1 * divergence(fp16), divergence(bf16) / 30)
