"""MoCo-v3's ViT: initial ranges, frozen patch embedding, fixed positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaler.nn.backbones import build_backbone
from scaler.nn.moco_v3 import fix_sincos_positions_, freeze_patch_embed_, init_moco_v3_, sincos_positions
from scaler.nn.vit import PackedViT


def make_vit(**overrides: Any) -> PackedViT:
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, **overrides}
    vit = build_backbone("vit_tiny_patch16_224", **options)
    assert isinstance(vit, PackedViT)
    return vit


def assert_uniform(weight: Tensor, bound: float) -> None:
    """The whole range is used, nothing lies outside, and the variance is a uniform's."""
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)


def test_initial_weights() -> None:
    vit = make_vit()
    init_moco_v3_(vit)
    for block in vit.blocks:
        for part in block.attn.qkv.weight.chunk(3):  # each as a 48 x 48 matrix of its own
            assert_uniform(part, math.sqrt(6 / (48 + 48)))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (48 + 48)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (48 + 192)))
        assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (48 + 192)))
    assert_uniform(vit.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + 48)))
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
    assert vit.cls_token is not None and 0 < vit.cls_token.abs().max() < 1e-5
    assert sum(isinstance(m, nn.Linear) for m in vit.modules()) == 8


def test_layer_scale_keeps_its_values() -> None:
    vit = make_vit(layer_scale=0.3)
    init_moco_v3_(vit)
    assert all((p == 0.3).all() for n, p in vit.named_parameters() if n.endswith("gamma"))


def test_positions_follow_the_formula() -> None:
    positions = sincos_positions(3, 5, 16).view(3, 5, 16).double().numpy()
    for row in range(3):
        for column in range(5):
            for i in range(4):
                frequency = 10_000 ** (-i / 4)
                expected = [
                    np.sin(column * frequency), np.cos(column * frequency),
                    np.sin(row * frequency), np.cos(row * frequency),
                ]  # fmt: skip
                np.testing.assert_allclose(positions[row, column, i::4], expected, atol=1e-6)
    assert len(np.unique(positions.reshape(15, 16).round(4), axis=0)) == 15


@pytest.mark.parametrize("registers", [0, 2])
def test_fixed_positions_and_frozen_patches_do_not_learn(registers: int) -> None:
    vit = make_vit(registers=registers)
    fix_sincos_positions_(vit)
    freeze_patch_embed_(vit)
    assert vit.pos_embed is not None
    torch.testing.assert_close(vit.pos_embed[0, -16:], sincos_positions(4, 4, 48))
    assert (vit.pos_embed[0, :-16] == 0).all() and vit.pos_embed.shape[1] == (16 if registers else 17)
    vit.pooled(torch.randn(2, 3, 32, 32)).square().sum().backward()
    frozen = {name for name, p in vit.named_parameters() if p.grad is None}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_width_that_4_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a width that 4 divides, got 54"):
        fix_sincos_positions_(make_vit(embed_dim=54))
