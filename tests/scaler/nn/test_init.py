"""Initial weights: the stated distributions, no parameter forgotten, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scaler.nn.backbones import build_backbone
from scaler.nn.init import assert_initialised, fill_nan_


def build(seed: int, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    vit = build_backbone("vit_small_patch16_224", image_size=64, depth=2, mask_token=True, **options)
    return vit.state_dict()


def test_every_parameter_has_its_distribution() -> None:
    state = build(0, registers=4, layer_scale=1e-5)
    for name, value in state.items():
        if name == "mask_token" or name.endswith("bias"):
            assert (value == 0).all(), name
        elif "gamma" in name:
            assert (value == 1e-5).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name in ("cls_token", "reg_token"):
            assert 0.8e-6 < value.std() < 1.2e-6, name
        elif name == "patch_embed.proj.weight":
            bound = (3 * 16 * 16) ** -0.5
            assert value.abs().max() <= bound and abs(value.std() - bound / 3**0.5) < 0.01 * bound, name
        else:
            assert name == "pos_embed" or name.endswith("weight"), name
            assert value.abs().max() < 0.12 and abs(value.std() - 0.02) < 1e-3 and value.mean().abs() < 1e-3, name


def test_the_seed_decides() -> None:
    first, again, other = build(3), build(3), build(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.1.mlp.fc1.weight"], other["blocks.1.mlp.fc1.weight"])


def test_the_backbones_own_layer_scale_is_kept_when_none_is_given() -> None:
    vit = build_backbone("vit_small_patch14_dinov2", image_size=28, depth=1)
    assert (vit.state_dict()["blocks.0.ls1.gamma"] == 1e-5).all()
    assert "blocks.0.ls1.gamma" not in build(0)


def test_a_forgotten_parameter_is_named() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    fill_nan_(module)
    nn.init.zeros_(module[0].weight)
    with pytest.raises(AssertionError, match=r"0\.bias, 1\.weight, 1\.bias"):
        assert_initialised(module)
