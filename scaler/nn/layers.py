"""The layer of its backbone that a parameter belongs to, for learning rates that fall from the head to the input."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from timm.models._manipulate import group_with_matcher

from scaler.nn.backbones import Backbone, TimmBackbone
from scaler.nn.vit import PackedViT


def parameter_layers(backbone: Backbone, *, name: str) -> tuple[Mapping[str, int], int]:
    """Layer of every parameter, counted from the input's 0, and the layer of a head on top of the backbone.

    Plain ViTs count as in BEiT and DINOv2 (`vit_layer`); other models as timm's layer decay does, by the model's own
    `group_matcher`, where mostly every block is a layer and a last norm belongs to the head or to the last block.

    Raises:
        ValueError: timm does not know the layers of the model, whose name is `name`.
    """
    if isinstance(backbone, PackedViT):
        depth = len(backbone.blocks)
        return {key: vit_layer(key, depth=depth) for key, _ in backbone.named_parameters()}, depth + 1
    assert isinstance(backbone, TimmBackbone)
    model = backbone.model
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"timm does not tell the layers of {name} apart; leave optim.layer_decay at 1.0")
    classifier = model.pretrained_cfg.get("classifier") or "head"
    head = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    named = itertools.chain(model.named_parameters(), [(head, None)])
    layers = group_with_matcher(named, model.group_matcher(coarse=False), reverse=True)
    return {f"model.{key}": layer for key, layer in layers.items() if key != head}, layers[head]


def vit_layer(name: str, *, depth: int) -> int:
    """Layer of a plain ViT's parameter: 0 before the blocks, block number + 1, depth + 1 after them (final norm)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0
