"""Backbones by name: timm's models as they are, and mistakes answered with the way out."""

from __future__ import annotations

import pytest
import timm
import torch

from scaler.nn.backbones import Stem, build_backbone
from scaler.nn.vit import PackedViT
from scaler.strategies.blocks import arrange_blocks_


@pytest.mark.parametrize(
    ("name", "size", "width", "cells", "num_blocks"),
    [("resnet18", 64, 512, 4, 8), ("convnext_atto", 64, 320, 4, 12), ("vit_tiny_patch16_224", 64, 192, 16, 12)],
)
def test_features_have_their_shapes_and_are_timms(
    name: str, size: int, width: int, cells: int, num_blocks: int
) -> None:
    backbone = build_backbone(name, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    out = backbone([images, images[:1]])
    assert [tuple(o.cls.shape) for o in out] == [(2, width), (1, width)]
    assert out[0].patches.shape == (2, cells, width) and backbone.num_features == width
    assert len(backbone.blocks()) == num_blocks
    inside = {id(p) for block in backbone.blocks() for p in block.parameters()}
    assert sum(p.numel() for p in backbone.parameters() if id(p) in inside) > 0.9 * sum(
        p.numel() for p in backbone.parameters()
    )
    if not backbone.is_vit:
        model = timm.create_model(name, num_classes=0).eval()
        model.load_state_dict(backbone.model.state_dict())
        torch.testing.assert_close(backbone.pooled(images), model(images))


def test_vits_become_packed_and_take_overrides() -> None:
    vit = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=4, depth=2, embed_dim=64, num_heads=2)
    assert isinstance(vit, PackedViT) and vit.is_vit and vit.grid_size == (8, 8) and len(vit.blocks()) == 2
    assert isinstance(build_backbone("deit_tiny_patch16_224", image_size=32, depth=1), PackedViT)
    pooled = build_backbone("vit_base_patch16_siglip_224", image_size=32, depth=1, embed_dim=64, num_heads=2)
    assert not pooled.is_vit and pooled.pooled(torch.randn(2, 3, 32, 32)).shape == (2, 64)  # no class token


def test_mistakes_name_the_way_out() -> None:
    with pytest.raises(ValueError, match="no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224"):
        build_backbone("vit_smal_patch16_224", image_size=224)
    with pytest.raises(ValueError, match="resnet18 is no plain ViT and has no layer_scale, registers"):
        build_backbone("resnet18", image_size=224, layer_scale=1e-5, registers=4)
    with pytest.raises(ValueError, match="image_size 100 is not a multiple of the patch size 16"):
        build_backbone("vit_tiny_patch16_224", image_size=100)
    with pytest.raises(ValueError, match="does not take these settings"):
        build_backbone("vit_tiny_patch16_224", image_size=32, no_such_option=3)
    with pytest.raises(ValueError, match="takes neither masks nor kept rows"):
        build_backbone("resnet18", image_size=32)([torch.randn(1, 3, 32, 32)], keep=[torch.zeros(1)])


def test_a_resnets_stem_is_a_unit_of_its_own_and_changes_nothing() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = backbone.model.forward_features(images)
    assert isinstance(backbone.stem, Stem) and not list(backbone.stem.parameters())
    assert torch.equal(backbone([images])[0].cls, expected.mean((2, 3)))
    arrange_blocks_([backbone.stem], checkpointing="none", compiled=True, backend="aot_eager")
    torch.testing.assert_close(backbone([images])[0].cls, expected.mean((2, 3)))
    assert not any("stem" in key for key in backbone.state_dict())
