"""The passes over a tile compile, once for any number of samples, to what they are without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from scaler.collectives import World
from scaler.methods.dinov2.loss import dino, ibot
from scaler.methods.dinov2.prototypes import Teacher, cross_entropy
from scaler.methods.dinov2.sinkhorn import sinkhorn_log_scaling
from scaler.methods.dinov2.tiles import default_tile_elements, tiles
from tests.long import only_long

K = 1000


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, 16), dim=-1)


def step(n: int, tokens: int, budget: int, *, fused: bool) -> list[Tensor]:
    """Targets' shifts, loss, signals and gradients of a step with n images and so many masked tokens."""
    torch.manual_seed(n)
    z, masked, prototypes = (x.requires_grad_() for x in (unit(5, n), unit(tokens), unit(K)))
    teacher_z, teacher_masked, keys = unit(2, n), unit(tokens), unit(K)
    shifts = [
        sinkhorn_log_scaling([x], keys, temperature=0.07, world=World(), tile_elements=budget, fused=fused)
        for x in (teacher_z.flatten(0, 1), teacher_masked)
    ]
    first, second = (
        Teacher(x, keys, shift, 0.07) for x, shift in zip((teacher_z, teacher_masked[None]), shifts, strict=True)
    )
    weights = torch.full((tokens,), 1 / tokens)
    comparisons = [dino(z, first), ibot(masked, second, weights=weights, num_crops=2)]
    total, values = cross_entropy(comparisons, prototypes, temperature=0.1, tile_elements=budget, fused=fused)
    signals = [x for row in values for x in row]
    return [*shifts, total.detach(), *signals, *torch.autograd.grad(total, [z, masked, prototypes])]


@only_long
@pytest.mark.parametrize(("dtype", "graphs"), [(None, 5), (torch.bfloat16, 3)])
def test_compiled_passes_give_the_same_and_compile_once_for_any_number_of_samples(
    dtype: torch.dtype | None, graphs: int
) -> None:
    counters.clear()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        for n, tokens in ((9, 37), (4, 30), (6, 13), (11, 200)):
            actual, wanted = (step(n, tokens, 40 * K, fused=fused) for fused in (True, False))
            for a, b in zip(actual, wanted, strict=True):
                assert (a - b).norm() <= (1e-3 if dtype else 1e-5) * b.norm()  # in bf16 some gradients round otherwise
    # Two of Sinkhorn's; a class token and its other one, local crops and both, masked tokens: each for all sizes.
    assert counters["stats"]["unique_graphs"] == graphs


def test_tiles_are_alike_and_the_budget_is_the_devices() -> None:
    for n, at_most, sizes in ((10, 4, [3, 3, 4]), (8, 4, [4, 4]), (3, 0, [1, 1, 1]), (0, 4, []), (2, 9, [2])):
        found = list(tiles(n, at_most=at_most))
        assert [len(range(n)[samples]) for samples in found] == sizes
        assert [i for samples in found for i in range(n)[samples]] == list(range(n))
    assert default_tile_elements(torch.device("cuda")) > default_tile_elements(torch.device("cpu"))
