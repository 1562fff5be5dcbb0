"""Products in fp8, emulated on a CPU: how near they are, that training follows bf16, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scaler.collectives import World
from scaler.nn.backbones import build_backbone
from scaler.strategies.blocks import arrange_blocks_
from scaler.strategies.fp8 import Fp8Linear, scaled_product, to_fp8_
from tests.distributed.helper import run_distributed
from tests.long import only_long
from tests.scaler.methods.dinov2.test_strategies import losses

CPU = torch.device("cpu")
WIDE = {"embed_dim": 48}


def test_rows_of_any_size_keep_three_bits() -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-20, 20, 32)[:, None]
    a, b = (sizes * torch.randn(32, 64)).bfloat16(), torch.randn(48, 64).bfloat16()
    exact = a.double() @ b.double().t()
    error = (scaled_product(a, b).double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 0.06
    a[3, 5] = torch.inf
    assert not scaled_product(a, b)[3].isfinite().any() and scaled_product(a, b)[4].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_products_are_those_emulated() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    torch.testing.assert_close(scaled_product(a.cuda(), b.cuda()).cpu(), scaled_product(a, b), rtol=0.02, atol=0.02)


def curve(*, fp8: bool, checkpointing: str = "none", compiled: bool = False) -> list[float]:
    """20 steps of a small ViT that learns to tell random images apart, in bf16."""
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=48, num_heads=3, patch_size=8)
    head = nn.Linear(48, 16)
    names, blocks = list(vit.state_dict()), vit.blocks()
    if fp8:
        to_fp8_(blocks, strategy="ddp", precision="bf16", device=CPU)
        assert sum(isinstance(module, Fp8Linear) for module in vit.modules()) == 8
    arrange_blocks_(blocks, checkpointing=checkpointing, compiled=compiled, backend="aot_eager")
    assert list(vit.state_dict()) == names and all(p.dtype is torch.float32 for p in vit.parameters())
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
    images, found = torch.randn(16, 3, 32, 32), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(head(vit.pooled(images)), torch.arange(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_follows_bf16() -> None:
    bf16, fp8 = curve(fp8=False), curve(fp8=True)
    assert bf16[-1] < 0.7 * bf16[0] and fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=0.03)
    assert curve(fp8=True, checkpointing="selective") == fp8


@only_long
def test_compiled_it_follows_too() -> None:
    assert curve(fp8=True, checkpointing="selective", compiled=True) == pytest.approx(curve(fp8=True), rel=1e-3)


@only_long
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_dinov2_on_two_ranks_follows_bf16_on_one(name: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16"}
    expected = losses(World(), "ddp", WIDE, settings)
    for actual in run_distributed(losses, 2, name, WIDE, {**settings, "fp8": True}):
        assert actual[::2] == pytest.approx(expected[::2], rel=0.03) and actual != expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "zero2"}, r"goes with strategy\.name=ddp or fsdp2, not zero2"),
        ({"precision": "fp32"}, r"goes with strategy\.precision=bf16, not fp32"),
        ({"blocks": [nn.Linear(32, 40)]}, r"sizes divide by 16, and here they are 40x32; set strategy\.fp8=false"),
        ({"blocks": [nn.Conv2d(3, 3, 3)]}, "here they are none"),
    ],
)
def test_where_it_cannot_be_it_says_so(changes: dict[str, Any], message: str) -> None:
    arguments = {"blocks": [nn.Linear(32, 32)], "strategy": "ddp", "precision": "bf16", "device": CPU} | changes
    with pytest.raises(ValueError, match=message):
        to_fp8_(arguments.pop("blocks"), **arguments)
