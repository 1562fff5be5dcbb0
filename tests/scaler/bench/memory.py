"""The memory of a step on a GPU that is not there: ours and the reference's, on fake tensors, in one run.

    python -m tests.scaler.bench.memory dinov2/vitl16_in1k --images 64

Every tensor of a step is counted while it lives, at its real size; nothing is computed. What an operation needs inside
itself (attention's and convolutions' workspaces) and what an allocator wastes is not seen, nor is what torch.compile
saves.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from scaler.bench.references.dinov2 import DINOv2Reference
from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.optimizers import build_optimizer
from scaler.plan.live import LiveBytes
from scaler.plan.trace import meta_method
from scaler.recipe import Recipe, load_recipe
from scaler.strategies.base import DTYPES
from scaler.strategies.ddp import DDP
from tests.fake_cuda import fake_batch, fake_cuda, to_fake_cuda

CUDA = torch.device("cuda")


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a GPU takes for it: without one, torch would write all weights of attention to memory."""
    if q.dtype.itemsize == 2:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return out
    needs_sums = torch.is_grad_enabled() and q.requires_grad
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needs_sums)[0]
    return out


def peak_bytes(make: Callable[[], Callable[[], Any]]) -> int:
    """Most bytes alive at any moment of a second step, what is there between steps included."""
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch), LiveBytes() as memory:
        patch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: fused_attention(q, k, v)
        )
        step = make()
        step()
        gc.collect()
        memory.peak = memory.live
        step()
    return memory.peak


def ours(recipe: Recipe, images: int) -> Callable[[], Any]:
    """Our step, under DDP on one rank."""
    world, method = World(), meta_method(recipe, world=World())
    raw = fake_batch(noise(method, images, world=world, device=torch.device("cpu")))
    to_fake_cuda(method)
    method.to = lambda device: method  # type: ignore[method-assign, assignment]  # it is there
    strategy = DDP(recipe.strategy, world=world, device=CUDA, clip_norm=recipe.optim.clip_norm, deterministic=False)
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
    return Stepper(recipe, method, strategy, world=world, batches=[raw]).step


def reference(recipe: Recipe, images: int) -> Callable[[], Any]:
    """The plain computation's step."""
    found = DINOv2Reference(recipe, precision=recipe.strategy.precision, device=CUDA)
    raw = fake_batch(noise(found.method, images, world=World(), device=torch.device("cpu")))
    return partial(found.step, repeat([raw]), lambda part: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=64)
    words = parser.parse_args()
    size = [f"data.global_batch_size={words.images}", "strategy.micro_batch_size=null", "strategy.compile=false"]
    rows: dict[str, int] = {}
    for checkpointing in ("none", "selective", "blocks"):
        chosen = [*size, f"strategy.activation_checkpointing={checkpointing}", *words.overrides]
        recipe = load_recipe(words.recipe, overrides=chosen, shards="none")
        assert recipe.strategy.precision in DTYPES
        if not rows:
            rows["reference"] = peak_bytes(partial(reference, recipe, words.images))
        rows[f"scaler, activation_checkpointing={checkpointing}"] = peak_bytes(partial(ours, recipe, words.images))
    for name, found in rows.items():
        print(f"{name:45} {found / 1e9:8.2f} GB  {found / rows['reference']:.2f}")


if __name__ == "__main__":
    main()
