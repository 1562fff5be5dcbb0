"""Initial weights. Everything is filled with NaN first, so that a parameter that no rule reaches shows at once.

Numbers come from torch's default generator: the caller seeds it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from scaler.nn.vit import PackedViT

InitialWeights = Literal["published", "fan_in"]


@torch.no_grad()
def fill_nan_(module: nn.Module) -> None:
    """Make every parameter NaN."""
    for parameter in module.parameters():
        parameter.fill_(float("nan"))


def assert_initialised(module: nn.Module) -> None:
    """Assert that no parameter holds a NaN; those on the meta device hold nothing."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.is_meta]
    missed = [name for name, parameter in named if parameter.isnan().any()]
    assert not missed, f"parameters without an initial value: {', '.join(missed)}"


@torch.no_grad()
def init_linear_(layer: nn.Linear, *, weights: InitialWeights = "published") -> None:
    """Normal weights truncated at ±2 (as in BEiT and DINO: an absolute bound), zero bias.

    The published deviation of 0.02 suits widths around a thousand, for which it is near 1/√fan_in. In a network of
    width 64 it leaves every branch almost silent, and the first thousands of steps go into making it heard; `fan_in`
    takes 1/√fan_in itself.
    """
    nn.init.trunc_normal_(layer.weight, std=0.02 if weights == "published" else layer.in_features**-0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_vit_(vit: PackedViT, *, layer_scale: float | None, weights: InitialWeights = "published") -> None:
    """DINOv2's initial weights of a ViT, or with `fan_in` their relatives for narrow ones (positions of 0.5).

    Truncated normal 0.02 for linear layers and positions, normal 1e-6 for class token and registers, zeros for the
    mask token and all biases, ones for norms, `layer_scale` for LayerScale, and torch's own range ±1/√fan_in for the
    patch projection.
    """
    fill_nan_(vit)
    if vit.pos_embed is not None:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02 if weights == "published" else 0.5)
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    if vit.mask_token is not None:
        nn.init.zeros_(vit.mask_token)
    module: Any
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            init_linear_(module, weights=weights)
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, module.init_values if layer_scale is None else layer_scale)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):  # LayerNorm, RMSNorm and their relatives
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    assert_initialised(vit)
