"""Loader batches and small methods for the tests of SimCLR."""

from __future__ import annotations

from typing import Any

import torch

from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.simclr.method import SimCLR

SIZE = 16
VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3,
    "head_out": 16, "temperature": 0.2,
}  # fmt: skip
RESNET: dict[str, Any] = {"backbone": "test_resnet", "head_out": 16, "temperature": 0.2}


def make_method(world: World | None = None, **settings: Any) -> SimCLR:
    """The same initial weights every time."""
    torch.manual_seed(0)
    return SimCLR(SimCLR.Settings(**settings), image_size=SIZE, world=world or World())


def make_batch(rows: range, *, global_batch_size: int = 12) -> Batch:
    """The given rows of one global batch, as the loader gives them."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (2, 1, global_batch_size, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    chosen = torch.tensor(list(rows))
    return {
        "views": {"view_1": pixels[0, :, chosen], "view_2": pixels[1, :, chosen]},
        "ids": 100 + chosen,
        "epochs": chosen % 2,
        "positions": chosen,
        "labels": torch.full((len(chosen),), -1),
        "global_batch_size": global_batch_size,
    }
