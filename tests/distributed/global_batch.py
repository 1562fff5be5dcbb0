"""The gradient of SimCLR's global batch of 256 on every layout, against the definition in float64 on one process.

    python -m tests.distributed.global_batch            # prints a Markdown table; exit code 1 where it is not exact

Gradients are compared over all parameters at once, ‖Δ‖ / ‖g‖. A strategy's gradient is read where every strategy
keeps it for checkpoints: after one step of SGD the momentum buffer is the gradient, put together from the pieces of
all ranks. A part of the table with small models is in the default tests (test_global_batch.py).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.simclr.method import SimCLR
from scaler.optimizers import build_optimizer
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import STRATEGIES, strategy_class
from tests.distributed.helper import run_distributed

BATCH = 256

_VIT = {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "temperature": 0.2}


@dataclass(frozen=True)
class Case:
    """A model, the size of its images, the precision in which it runs, and what may be lost by that."""

    name: str
    image_size: int
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


VIT = Case("ViT, head with batch norm", 32, {**_VIT, "depth": 4, "embed_dim": 96, "num_heads": 3})
DROP_PATH = Case("ViT, drop path 0.3", 32, {**VIT.settings, "drop_path": 0.3, "group_size": 32})
# At the kinks of ReLU and max-pooling rounding decides, and of so many activations some lie there: in float32 a few
# gradients go another way, on one process too. In float64 none does (ZeRO keeps its gradients in float32 all the same).
RESNET = Case("ResNet-18, global batch norm", 32, {"backbone": "resnet18", "temperature": 0.2}, tolerance=1e-3)
RESNET_64 = replace(RESNET, name=f"{RESNET.name}, float64", dtype=torch.float64, tolerance=1e-6)


@dataclass(frozen=True)
class Layout:
    """A strategy and how many micro-batches every rank has."""

    strategy: str
    num_micro_batches: int


Pieces = dict[str, tuple[int, Tensor, int]]  # parameter: where the rank's part starts, the part, elements of the whole


def make_method(case: Case, *, world: World) -> SimCLR:
    """The same initial weights every time."""
    torch.manual_seed(0)
    return SimCLR(SimCLR.Settings(**case.settings), image_size=case.image_size, world=world).to(case.dtype)


def make_batch(case: Case, rows: range) -> Batch:
    """The given rows of the global batch, as the loader gives them: smooth random pictures and crops of them."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(2, BATCH, 3, 4, 4, generator=generator)
    coarse[1] = 0.5 * coarse[0] + 0.5 * coarse[1]  # two views of an image have something in common
    size = (case.image_size, case.image_size)
    pixels = nn.functional.interpolate(coarse.flatten(0, 1), size=size, mode="bilinear").unflatten(0, (2, BATCH))
    pixels = (pixels * 255).to(torch.uint8)[:, None]
    chosen = torch.tensor(list(rows))
    return {
        "views": {"view_1": pixels[0, :, chosen], "view_2": pixels[1, :, chosen]},
        "ids": chosen,
        "epochs": torch.zeros_like(chosen),
        "positions": chosen,
        "labels": torch.full((len(chosen),), -1),
        "global_batch_size": BATCH,
    }


def definition(case: Case) -> dict[str, Tensor]:
    """The gradient by plain autograd on the whole batch and the full matrix of similarities, in float64."""
    method = make_method(case, world=World()).double()
    batch = method.augment(make_batch(case, range(BATCH)), seed=1, step=0)
    keep = None if batch["keep"] is None else [batch["keep"]]
    z = nn.functional.normalize(method.head(method.backbone([batch["images"].double()], keep=keep)[0].cls))
    scores = (z @ z.T / method.settings.temperature).masked_fill(torch.eye(2 * BATCH, dtype=torch.bool), -torch.inf)
    nn.functional.cross_entropy(scores, torch.arange(2 * BATCH).roll(BATCH)).backward()
    return {name: p.grad.flatten() for name, p in method.named_parameters() if p.grad is not None}


def one_gradient(world: World, case: Case, layout: Layout) -> Pieces:
    """This rank's part of the gradient after what the loop does in a step."""
    strategy = strategy_class(layout.strategy)(
        StrategySettings(name=layout.strategy, precision="fp32"),
        world=world,
        device=torch.device("cpu"),
        clip_norm=None,
        deterministic=False,
    )
    method, optim = make_method(case, world=world), Optim(name="sgd", lr=1e-3)
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    share, size = BATCH // world.size, BATCH // world.size // layout.num_micro_batches
    method.check_layout(num_micro_batches=layout.num_micro_batches, micro_batch_size=size)
    batches = [
        method.augment(make_batch(case, range(start, start + size)), seed=1, step=0)
        for start in range(share * world.rank, share * (world.rank + 1), size)
    ]
    batches = [{**batch, "images": batch["images"].to(case.dtype)} for batch in batches]
    targets: list[Any] = [None] * len(batches)
    if method.observes(len(batches)):
        targets = strategy("combine", [strategy("observe", batch, {}) for batch in batches], {})
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        with strategy.accumulate(last=i == len(batches) - 1):
            strategy.backward(strategy("learn", batch, target, {})["loss"] / len(batches))
    assert strategy.step().taken
    return {
        key.removeprefix("optimizer/").removesuffix("/momentum_buffer"): (
            piece.start,
            piece.data,
            int(torch.Size(piece.shape).numel()),
        )
        for key, piece in strategy.pieces().items()
        if key.endswith("/momentum_buffer")
    }


def gradients(world: World, jobs: list[tuple[Case, Layout]]) -> list[Pieces]:
    """Jobs one after the other in the same processes, which saves their start."""
    return [one_gradient(world, *job) for job in jobs]


def difference(ranks: list[Pieces], wanted: dict[str, Tensor]) -> float:
    """‖Δ‖ / ‖g‖ over all parameters, of the gradient that the ranks hold between them."""
    assert all(pieces.keys() == wanted.keys() for pieces in ranks)
    error = norm = 0.0
    for name, gradient in wanted.items():
        got = torch.full((ranks[0][name][2],), float("nan"), dtype=torch.float64)
        for pieces in ranks:
            start, data, _ = pieces[name]
            got[start : start + len(data)] = data.double()
        error += float((got - gradient).square().sum())
        norm += float(gradient.square().sum())
    return (error / norm) ** 0.5


def differences(num_ranks: int, jobs: list[tuple[Case, Layout]], wanted: dict[str, dict[str, Tensor]]) -> list[float]:
    """The difference of each job on so many processes from the gradient wanted for its case (by name)."""
    results = run_distributed(gradients, num_ranks, jobs, timeout=1800)
    return [difference([rank[i] for rank in results], wanted[case.name]) for i, (case, _) in enumerate(jobs)]


def main() -> int:
    """Measure all layouts and print the table."""
    layouts = [(case, *layout) for case in (VIT, DROP_PATH) for layout in ((1, 1), (1, 4), (2, 2))]
    layouts += [(case, num_ranks, 1) for case in (RESNET, RESNET_64) for num_ranks in (1, 2, 4)]
    wanted = {case.name: definition(case) for case in (VIT, DROP_PATH, RESNET, RESNET_64)}
    exact = True
    print(f"| | ranks × micro-batches × images | {' | '.join(STRATEGIES)} |")
    print("|---" * (2 + len(STRATEGIES)) + "|")
    for case, num_ranks, num_micro_batches in layouts:
        found = differences(num_ranks, [(case, Layout(name, num_micro_batches)) for name in STRATEGIES], wanted)
        exact &= max(found) <= case.tolerance
        layout = f"{num_ranks} × {num_micro_batches} × {BATCH // num_ranks // num_micro_batches}"
        print(f"| {case.name} | {layout} | {' | '.join(f'{value:.1e}' for value in found)} |", flush=True)
    return int(not exact)


if __name__ == "__main__":
    sys.exit(main())
