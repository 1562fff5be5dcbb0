"""The network that DINOv2 has twice, as student and as teacher, and its optimiser groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from scaler.methods.dinov2.settings import Settings
from scaler.nn.backbones import build_backbone
from scaler.nn.dino_head import DINOHead
from scaler.nn.layers import vit_layer
from scaler.nn.vit import PackedViT


class Network(nn.Module):
    """Backbone, DINO head, and an iBOT head where it has one of its own."""

    def __init__(self, settings: Settings, *, image_size: int) -> None:
        super().__init__()
        backbone = build_backbone(
            settings.backbone,
            image_size=image_size,
            drop_path=settings.drop_path,
            layer_scale=settings.layer_scale,
            registers=settings.registers,
            patch_size=settings.patch_size,
            mask_token=True,
            initial_weights=settings.initial_weights,
            depth=settings.depth,
            embed_dim=settings.embed_dim,
            num_heads=settings.num_heads,
        )
        assert isinstance(backbone, PackedViT)  # anything else has refused the mask token
        self.backbone = backbone
        self.dino_head = self._head(settings)
        self.ibot_head = self._head(settings) if settings.separate_heads else None

    def _head(self, settings: Settings) -> DINOHead:
        return DINOHead(
            self.backbone.num_features,
            num_prototypes=settings.num_prototypes,
            hidden=settings.head_hidden,
            bottleneck=settings.head_bottleneck,
            initial_weights=settings.initial_weights,
        )

    @property
    def patch_head(self) -> DINOHead:
        """The head of the masked tokens."""
        return self.dino_head if self.ibot_head is None else self.ibot_head


def parameter_groups(
    network: Network, *, prefix: str, layer_decay: float, patch_embed_lr_scale: float
) -> list[dict[str, Any]]:
    """Optimiser groups of a network whose parameters are called `prefix` + name; equal settings share a group.

    Learning rates are multiplied by layer_decay^(depth + 1 - i): i = 0 for everything before the blocks (the patch
    embedding has a further factor), i = 1 … depth for the blocks, depth + 1 (no decay) for the final norm and the
    heads. Biases, norms and LayerScale have no weight decay; class token, positions, mask token, registers and both
    weight-norm parameters have. The heads' last layers follow a learning rate of their own, which may be frozen.
    """
    depth = len(network.backbone.blocks)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        module, _, rest = name.partition(".")
        decays = not (rest.endswith("bias") or "norm" in rest or "gamma" in rest)
        lr_scale = 1.0
        if module == "backbone":
            lr_scale = layer_decay ** (depth + 1 - vit_layer(rest, depth=depth))
            if rest.startswith("patch_embed."):
                lr_scale *= patch_embed_lr_scale
        settings = {
            "lr_scale": lr_scale,
            "weight_decay_scale": float(decays),
            "clip": module,
            "lr_key": "last_layer_lr" if rest.startswith("last_layer.") else "lr",
        }
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(prefix + name)
    return list(groups.values())
