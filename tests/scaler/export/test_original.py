"""The original DINOv2's layout, and what the original computes from it, against timm's models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from scaler.export.original import forward, original_names


@pytest.mark.parametrize("embeds_prefix", [True, False])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_giant_patch14_dinov2"])  # GELU, and SwiGLU
@torch.no_grad()
def test_it_is_what_timm_computes(name: str, registers: int, embeds_prefix: bool) -> None:
    torch.manual_seed(0)
    size = 4 * (14 if "14" in name else 16)
    options = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": size, "init_values": 0.3, "num_classes": 0}
    model: Any = timm.create_model(name, **options, reg_tokens=registers, no_embed_class=not embeds_prefix).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    state = original_names(model.state_dict(), num_positions=1 + registers if embeds_prefix else 0)
    assert state["pos_embed"].shape == (1, 17, 48) and state["mask_token"].shape == (1, 48)
    assert ("register_tokens" in state) == bool(registers) and ("blocks.1.mlp.w3.bias" in state) == ("giant" in name)
    images = torch.randn(2, 3, size, size)
    cls, patches = forward(state, images, num_heads=4)
    wanted = model.forward_features(images)
    assert (cls - wanted[:, 0]).abs().max() < 1e-5
    assert (patches - wanted[:, 1 + registers :]).abs().max() < 1e-5
