"""The operations that a step's model needs, and how many of them this machine can do.

step = model_flops(recipe, micro_batch_size=64)         # of one micro-batch on one rank
rate = best_matmul_rate(device, torch.bfloat16, seconds=0.5)
utilisation = step / seconds / rate
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.plan.trace import NUM_SAMPLES, Flops, fake, make_fake_, meta_method
from scaler.recipe import Recipe
from scaler.timetable import Timetable

_SIZES = {"cuda": 8192, "cpu": 1024}  # rows and columns of the product: large enough for the device's best rate


def model_flops(recipe: Recipe, *, micro_batch_size: int) -> int:
    """Floating-point operations that one micro-batch cannot do without, by torch's formulas: two a multiplication.

    The student forward and backward, the teacher forward, every row's scores once (and their gradient); not what
    activation checkpointing and the attention's backward recompute, nor what combining scores again (Sinkhorn-Knopp),
    nor the rows that skip a block by drop path. Only products, convolutions and attention count.
    """
    method = meta_method(recipe, world=World())
    hyper = Timetable(recipe, num_samples=NUM_SAMPLES).hyper(method, 0)
    raw = noise(method, micro_batch_size, world=World(), device=torch.device("meta"))
    augmented = method.augment(raw, seed=recipe.run.seed, step=0)
    with FakeTensorMode():
        make_fake_(method, dtype=None)
        batch, flops, target = tree_map(fake, augmented), _ModelFlops(), None
        if method.observes(1):
            with torch.no_grad():
                with flops:
                    observation = method("observe", batch, hyper)
                (target,) = method("combine", [observation], hyper)
        with flops:
            method("learn", batch, target, hyper)["loss"].backward()
    return flops.count


class _ModelFlops(Flops):
    """Without the scores that the attention's backward computes again, the fifth of its five products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.count
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "attention" in str(func) and "backward" in str(func):
            self.count -= (self.count - before) // 5
        return out


def best_matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
    """Floating-point operations per second of a large square product of random values, the best of many.

    It runs as the training's own do: what `torch.set_float32_matmul_precision` says holds for float32.
    """
    n = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        best = min(best, _product_seconds(a, b, out))
    return 2 * n**3 / best


def _product_seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    """Of one product, among several in a row on a GPU, so that launching it does not count."""
    if a.device.type != "cuda":
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - began
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        torch.mm(a, b, out=out)
    events[-1].synchronize()
    return min(x.elapsed_time(y) for x, y in itertools.pairwise(events)) / 1000
