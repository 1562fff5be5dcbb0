"""What MoCo-v3 (Chen, Xie & He, arXiv 2104.02057) changes in a ViT to keep contrastive training stable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scaler.nn.init import assert_initialised, fill_nan_
from scaler.nn.vit import PackedViT


@torch.no_grad()
def init_moco_v3_(vit: PackedViT) -> None:
    """Xavier-uniform linear layers, where q, k and v count as three matrices, and likewise the patch projection.

    Class token and registers are normal with deviation 1e-6, learned positions truncated normal 0.02, biases zero and
    norms one. A model with LayerScale is not covered (its factors keep their values).
    """
    kept = {name: p.clone() for name, p in vit.named_parameters() if name.endswith("gamma")}
    fill_nan_(vit)
    for name, parameter in vit.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    if vit.mask_token is not None:
        nn.init.zeros_(vit.mask_token)
    if vit.pos_embed is not None:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    for name, module in vit.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_out, fan_in = module.weight.shape[0], module.weight[0].numel()
            if name.endswith("attn.qkv"):
                fan_out //= 3
            bound = math.sqrt(6.0 / (fan_in + fan_out))
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(weight, nn.Parameter):
            nn.init.ones_(weight)
        if isinstance(weight, nn.Parameter) and getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    assert_initialised(vit)


def freeze_patch_embed_(vit: PackedViT) -> None:
    """Keep the patch projection at its initial weights; it takes no gradient."""
    vit.patch_embed.requires_grad_(False)


@torch.no_grad()
def fix_sincos_positions_(vit: PackedViT) -> None:
    """Give the patches fixed sine-cosine positions (zero for class token and registers); they take no gradient.

    Raises:
        ValueError: a ViT without position embedding, or of a width that 4 does not divide.
    """
    if vit.pos_embed is None:
        raise ValueError("this ViT has no position embedding to replace; leave sincos_positions off")
    if vit.num_features % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, got {vit.num_features}")
    positions = sincos_positions(*vit.grid_size, vit.num_features)
    prefix = vit.pos_embed.shape[1] - len(positions)
    vit.pos_embed.zero_()
    vit.pos_embed[0, prefix:] = positions
    vit.pos_embed.requires_grad_(False)


def sincos_positions(height: int, width: int, dim: int, *, base: float = 10_000.0) -> Tensor:
    """Positions of a grid, row by row, [height * width, dim]: sin and cos of the column, then of the row.

    Each quarter has the dim/4 frequencies base^(-i / (dim/4)).
    """
    frequencies = base ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = columns.flatten()[:, None] * frequencies
    y = rows.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()
