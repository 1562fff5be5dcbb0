"""A DINOv2 of a few thousand weights, and batches for it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.dinov2.method import DINOv2


def tiny_settings(**changes: Any) -> Any:
    """Settings with which a step takes milliseconds."""
    values: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3,
        "layer_scale": 0.5, "drop_path": 0.3, "group_size": 4, "num_local_crops": 3, "local_size": 16,
        "num_prototypes": 40, "head_hidden": 32, "head_bottleneck": 16, "blur_kernel": 3,
        "teacher_temperature_warmup": "5 steps", "freeze_last_layer": "2 steps",
    }  # fmt: skip
    return DINOv2.Settings(**(values | changes))


def tiny_method(world: World | None = None, *, seed: int = 0, **changes: Any) -> DINOv2:
    """A method whose teacher is not its student's copy any more, so that mixing them up shows."""
    torch.manual_seed(seed)
    method = DINOv2(tiny_settings(**changes), image_size=32, world=world or World())
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method.train()


def loader_batch(method: DINOv2, *, rows: slice, size: int = 16) -> Batch:
    """Rows of a global batch of random pixels, as the loader hands them out."""
    generator = torch.Generator().manual_seed(5)
    views = {
        v.name: torch.randint(0, 256, (v.count, size, 3, v.size, v.size), dtype=torch.uint8, generator=generator)
        for v in method.views
    }
    return {
        "views": {name: view[:, rows] for name, view in views.items()},
        "ids": torch.arange(100, 100 + size)[rows],
        "epochs": torch.zeros(size, dtype=torch.int64)[rows],
        "positions": torch.arange(size)[rows],
        "labels": torch.zeros(size, dtype=torch.int64)[rows],
        "global_batch_size": size,
    }


def micro_batches(method: DINOv2, cuts: list[int], *, step: int = 3, double: bool = False) -> list[Batch]:
    """Augmented micro-batches between the cuts of a global batch."""
    batches = []
    for start, stop in itertools.pairwise(cuts):
        batch = method.augment(loader_batch(method, rows=slice(start, stop)), seed=0, step=step)
        if double:
            batch["crops"] = [crops.double() for crops in batch["crops"]]
            batch["mask_weights"] = 1.0 / batch["masks"].sum(dim=1).double().repeat_interleave(
                batch["masks"].sum(dim=1)
            )
        batches.append(batch)
    return batches
