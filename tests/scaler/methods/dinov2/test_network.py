"""Optimiser groups of ViT-L against a table made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from timm.optim import param_groups_layer_decay

from scaler.methods.dinov2.network import Network, parameter_groups
from scaler.methods.dinov2.settings import Settings


@pytest.fixture(scope="module")
def vit_large() -> Network:
    """ViT-L's 24 blocks, narrower."""
    return Network(
        Settings(embed_dim=32, num_heads=2, registers=4, num_prototypes=50, head_hidden=16, head_bottleneck=8,
                 separate_heads=True),
        image_size=224,
    )  # fmt: skip


def by_name(network: Network, **options: float) -> dict[str, tuple[float, float, str, str]]:
    table = {}
    for group in parameter_groups(network, prefix="student.", **options):
        assert len(group["params"]) == len(group["names"])
        for name in group["names"]:
            assert name not in table
            table[name] = (group["lr_scale"], group["weight_decay_scale"], group["clip"], group["lr_key"])
    return table


def test_vit_large_has_the_table_of_the_short_recipe(vit_large: Network) -> None:
    table = by_name(vit_large, layer_decay=0.9, patch_embed_lr_scale=0.2)
    assert set(table) == {f"student.{name}" for name, _ in vit_large.named_parameters()}

    def row(name: str, lr_scale: float, decay: float, clip: str, key: str = "lr") -> None:
        actual = table.pop(f"student.{name}")
        assert actual[0] == pytest.approx(lr_scale, rel=1e-12) and actual[1:] == (decay, clip, key), name

    for name in ("cls_token", "pos_embed", "mask_token", "reg_token"):
        row(f"backbone.{name}", 0.9**25, 1.0, "backbone")  # 0.0717897987691853
    row("backbone.patch_embed.proj.weight", 0.0717897987691853 * 0.2, 1.0, "backbone")
    row("backbone.patch_embed.proj.bias", 0.0717897987691853 * 0.2, 0.0, "backbone")
    by_hand = {0: 0.07976644307687255, 1: 0.08862938119652507, 11: 0.2541865828329, 22: 0.81, 23: 0.9}
    for i in range(24):
        scale = 0.9 ** (24 - i)
        if i in by_hand:
            assert scale == pytest.approx(by_hand[i], rel=1e-10)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            row(f"backbone.blocks.{i}.{layer}.weight", scale, 1.0, "backbone")
            row(f"backbone.blocks.{i}.{layer}.bias", scale, 0.0, "backbone")
        for layer in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            row(f"backbone.blocks.{i}.{layer}", scale, 0.0, "backbone")
    row("backbone.norm.weight", 1.0, 0.0, "backbone")
    row("backbone.norm.bias", 1.0, 0.0, "backbone")
    for head in ("dino_head", "ibot_head"):
        for layer in (0, 2, 4):
            row(f"{head}.mlp.{layer}.weight", 1.0, 1.0, head)
            row(f"{head}.mlp.{layer}.bias", 1.0, 0.0, head)
        row(f"{head}.last_layer.weight_g", 1.0, 1.0, head, "last_layer_lr")
        row(f"{head}.last_layer.weight_v", 1.0, 1.0, head, "last_layer_lr")
    assert not table


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_layer_decay_is_timms(depth: int) -> None:
    sizes = {"depth": depth, "embed_dim": 12, "num_heads": 3}
    heads = {"num_prototypes": 5, "head_hidden": 4, "head_bottleneck": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, init_values=0.1, num_classes=2, img_size=32)
    network = Network(Settings(backbone="vit_tiny_patch16_224", patch_size=16, **sizes, **heads), image_size=32)
    # timm counts the final norm to the last block; the original DINOv2 to the head
    names = {id(p): name for name, p in model.named_parameters() if not name.startswith(("norm.", "head."))}
    for decay in np.random.default_rng(depth).uniform(0.3, 1.0, size=50):
        groups = param_groups_layer_decay(model, layer_decay=decay)
        expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"] if id(p) in names}
        actual = by_name(network, layer_decay=decay, patch_embed_lr_scale=1.0)
        assert {name: actual[f"student.backbone.{name}"][0] for name in expected} == pytest.approx(expected, rel=1e-10)


def test_equal_settings_share_a_group(vit_large: Network) -> None:
    # 25 scales with and without decay (the first has no undecayed one), patch embedding 2, final norm 1, heads 2 × 3
    assert len(parameter_groups(vit_large, prefix="", layer_decay=0.9, patch_embed_lr_scale=0.2)) == 49 + 2 + 1 + 6
    assert len(parameter_groups(vit_large, prefix="", layer_decay=1.0, patch_embed_lr_scale=1.0)) == 2 + 6


def test_a_shared_head_serves_both_losses() -> None:
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_prototypes": 9, "head_hidden": 8, "head_bottleneck": 4}
    shared = Network(Settings(**options), image_size=32)
    assert shared.patch_head is shared.dino_head
    separate = Network(Settings(**options, separate_heads=True), image_size=32)
    assert separate.patch_head is not separate.dino_head
    assert {g["clip"] for g in parameter_groups(shared, prefix="", layer_decay=1.0, patch_embed_lr_scale=1.0)} == {
        "backbone", "dino_head"
    }  # fmt: skip


def test_only_vits_are_taken() -> None:
    with pytest.raises(ValueError, match="resnet18 is no plain ViT and has no layer_scale, mask_token"):
        Network(Settings(backbone="resnet18"), image_size=32)
