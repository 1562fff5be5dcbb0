"""Heads and centres for continued pre-training, from a run of ours or a training checkpoint of the original DINOv2."""

from __future__ import annotations

import torch
from torch import Tensor

from scaler.methods.dinov2.network import Network
from scaler.nn.weights import Weights, plain_name

# What the softmax centring's moving means are called here and in the original.
_CENTERS = {"cls": ("cls_center", "dino_loss.center"), "patch": ("patch_center", "ibot_patch_loss.center")}


@torch.no_grad()
def load_heads_(network: Network, weights: Weights, *, backbone_prefix: str) -> tuple[bool, str]:
    """Fill the heads with those beside a backbone of the source, all or none: half of them would fit nothing.

    Args:
        backbone_prefix: of the backbone's names in the source, as `load_backbone_` has found it.

    Returns:
        Whether they did fit, and a line for the user.
    """
    afresh = "heads: start afresh,"
    beside = backbone_prefix.removesuffix("backbone.")
    names = {plain_name(name, vit=False): name for name in weights.tensors}
    found = {
        name[len(beside) :]: old
        for name, old in names.items()
        if name.startswith((f"{beside}dino_head.", f"{beside}ibot_head."))
    }
    if beside == backbone_prefix or not found:
        return False, f"{afresh} {weights.place} has none"
    target = {name: t for name, t in network.state_dict().items() if not name.startswith("backbone.")}
    values = {name: weights.tensors[old] for name, old in found.items()}
    if others := sorted(values.keys() ^ target.keys()):
        return False, f"{afresh} {weights.place} has others (they differ in {others[0]}; see method.separate_heads)"
    for name, tensor in target.items():
        if values[name].shape != tensor.shape:
            shapes = f"{list(values[name].shape)} where the recipe wants {list(tensor.shape)}"
            return False, f"{afresh} {weights.place} has {name} of shape {shapes}"
    for name, tensor in target.items():
        tensor.copy_(values[name])
    return True, f"heads: {len(target)} tensors from {weights.place} ({beside}*)"


@torch.no_grad()
def load_centers_(centers: dict[str, Tensor], weights: Weights) -> str:
    """Fill the centres [K], by kind, with the source's; a line for the user."""
    found = {
        kind: weights.tensors[name]
        for kind, aliases in _CENTERS.items()
        for name in weights.tensors
        if any(name == alias or name.endswith(f".{alias}") for alias in aliases)
    }
    if any(kind not in found or found[kind].numel() != center.numel() for kind, center in centers.items()):
        return f"centres: start at zero, {weights.place} has none that fit"
    for kind, center in centers.items():
        center.copy_(found[kind].flatten())
    return f"centres: from {weights.place}"
