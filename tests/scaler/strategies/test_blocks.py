"""Blocks under checkpointing and compilation: the same gradients, less memory, and nothing that falls back unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from scaler.nn.backbones import build_backbone
from scaler.nn.vit import PackedViT
from scaler.plan.live import LiveBytes
from scaler.strategies.blocks import arrange_blocks_
from tests.long import only_long

DEPTH = 9  # more blocks than dynamo compiles variants of one function
CROPS = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3, 16, 16)]
KEEP = [torch.arange(1).expand(DEPTH, 2, 1), torch.arange(3).expand(DEPTH, 2, 3)]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def vit(*, trained: bool = True) -> PackedViT:
    torch.manual_seed(0)
    options = {"depth": DEPTH, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "layer_scale": 0.1, "drop_path": 0.3}
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, **options).requires_grad_(trained)
    assert isinstance(backbone, PackedViT)
    return backbone


def distance(student: PackedViT, teacher: PackedViT) -> Tensor:
    with torch.no_grad():
        goal = teacher(CROPS[:1])[0].cls
    return (student(CROPS, keep=KEEP)[0].cls - goal).square().sum()


def gradient(student: PackedViT, teacher: PackedViT) -> Tensor:
    student.zero_grad()
    distance(student, teacher).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def waiting(student: PackedViT, teacher: PackedViT) -> int:
    """Bytes that the backward will need."""
    with LiveBytes() as memory:
        loss = distance(student, teacher)
        assert loss.requires_grad
        return memory.live


@pytest.mark.parametrize("precision", [pytest.param(torch.float32, marks=only_long), torch.bfloat16])
def test_gradients_do_not_depend_on_what_is_kept_and_compiled(precision: torch.dtype) -> None:
    kept = {}
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        expected = gradient(vit(), vit(trained=False))
        for checkpointing in ("none", "selective", "blocks", 5):
            networks = vit(), vit(trained=False)
            arrange_blocks_([b for network in networks for b in network.blocks()], checkpointing=checkpointing)
            kept[checkpointing] = waiting(*networks)
            assert torch.equal(gradient(*networks), expected)
            assert list(networks[0].state_dict()) == list(vit().state_dict())
        for checkpointing in ("none", "selective", "blocks"):
            networks = vit(), vit(trained=False)
            blocks = [b for network in networks for b in network.blocks()]
            arrange_blocks_(blocks, checkpointing=checkpointing, compiled=True, backend="aot_eager")
            counters.clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*compiled")
                torch.testing.assert_close(gradient(*networks), expected, rtol=1e-5, atol=1e-6)
                gradient(*networks)
            assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], "18 blocks, two graphs"
    assert kept["blocks"] < kept[5] < kept["none"]
    casts = 2 * sum(p.numel() for p in vit().parameters()) * (precision is torch.bfloat16)  # kept by autocast
    assert kept["blocks"] < 0.3 * (kept["none"] - casts) + casts
    assert kept["blocks"] < kept["selective"] < 0.7 * (kept["none"] - casts) + casts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "blocks"])
def test_on_a_gpu_compiled_blocks_have_the_same_gradients(checkpointing: str) -> None:
    crops, keep = [x.cuda() for x in CROPS], [x.cuda() for x in KEEP]
    gradients = []
    for compiled in (False, True):
        network = vit().cuda()
        arrange_blocks_(network.blocks(), checkpointing=checkpointing if compiled else "none", compiled=compiled)
        with torch.autocast("cuda", torch.bfloat16):
            out = network(crops, keep=keep)[0].cls
        out.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    plain, found = gradients
    assert float((found - plain).norm() / plain.norm()) < 0.02


class Chatty(nn.Module):
    """A block whose graph breaks in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        torch._dynamo.graph_break()
        return x + 1


def test_what_cannot_be_compiled_says_so_and_runs() -> None:
    block = Chatty()
    arrange_blocks_([block], checkpointing="none", compiled=True, backend="eager")
    with pytest.warns(UserWarning, match=r"Chatty cannot be compiled as a whole \(.*in pieces"):
        assert torch.equal(block(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert counters["stats"]["unique_graphs"] == 2


def test_what_keeps_statistics_is_not_compiled_in_pieces() -> None:
    block = Chatty()
    block.register_buffer("seen", torch.zeros(()))
    arrange_blocks_([block], checkpointing="none", compiled=True, backend="eager")
    with pytest.warns(UserWarning, match=r"Chatty cannot be compiled as a whole \(.*: it is not compiled"):
        assert torch.equal(block(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert counters["stats"]["unique_graphs"] == 0


def test_too_many_kinds_of_input_are_said_and_run_uncompiled() -> None:
    block = nn.Linear(3, 3)
    arrange_blocks_([block], checkpointing="none", compiled=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*compiled")
            for rows in (1, 2, 3):
                block(torch.ones(rows, 3))
        with pytest.warns(UserWarning, match=r"Linear has met more than 3 kinds of input .*strategy\.compile=false"):
            assert block(torch.ones(4, 3)).shape == (4, 3)
