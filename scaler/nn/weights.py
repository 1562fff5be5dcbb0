"""Weights from elsewhere into a backbone, strictly: every tensor comes from the source, or is named and excused.

    loaded = load_backbone_(backbone, weights)     # as scaler.weights.read_weights("dinov2_vitl14.pth", …) reads them
    print(loaded.line)

A source is a flat mapping from names to tensors. The backbone's own names are looked for behind any prefix
(`module.`, `teacher.backbone.`, …). ViTs may come as timm names them, or as the original DINOv2 does: blocks in chunks,
`register_tokens`, `w12` and `w3` of SwiGLU, the class token's position apart from the token. Positions are resized to
the backbone's grid.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaler.nn.base import Backbone
from scaler.nn.precision import at_least_fp32
from scaler.nn.vit import PackedViT, resize_positions

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_VIT_NAMES = (  # the original DINOv2's names, and timm's
    (re.compile(r"(^|\.)blocks\.\d+\.(\d+)\."), r"\1blocks.\2."),  # chunks of blocks; the second number counts all
    (re.compile(r"(^|\.)register_tokens$"), r"\1reg_token"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)
_HEAD_NAMES = (  # torch's newer weight normalisation
    (re.compile(r"\.parametrizations\.weight\.original0$"), ".weight_g"),
    (re.compile(r"\.parametrizations\.weight\.original1$"), ".weight_v"),
)
# What belongs to a ViT's features, whether or not this one has it: none of it may be left out in silence.
_VIT_PARTS = {"cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed", "norm_pre", "blocks", "norm"}
# Where a source holds a backbone several times: the averaged one is the better, and of two networks the first is meant.
_AVERAGED = {"teacher", "ema", "average", "model_ema", "state_dict_ema"}
_FIRST = {"student", "base_encoder", "encoder_q"}


@dataclass(frozen=True)
class Weights:
    """Named tensors from somewhere.

    Attributes:
        place: where they are from, as messages call it.
        tensors: read when they are asked for.
        normalization: mean and deviation per channel of the pixels (from 0 to 1) that they learned from, if known.
        num_heads: attention heads of a ViT, if known: no shape tells them.
    """

    place: str
    tensors: Mapping[str, Tensor]
    normalization: Normalization | None = None
    num_heads: int | None = None


class Loaded(NamedTuple):
    """What `load_backbone_` did: the prefix of the backbone's names in the source, and a line for the user."""

    prefix: str
    line: str


@torch.no_grad()
def load_backbone_(
    backbone: Backbone, weights: Weights, *, normalization: Normalization | None = None, what: str = "backbone"
) -> Loaded:
    """Fill a backbone, parameters and buffers, with weights of the same architecture.

    Excused, and named in the line: a mask token (it keeps its initial value), LayerScale where the source has none at
    all (its factors become 1, which is the same), counts of batches, and classifiers and decoders of the source.

    Args:
        normalization: of the pixels that the backbone will get; a difference is told.
        what: how the line calls the backbone.

    Raises:
        ValueError: nothing like this backbone, several of them, or not all of it; names what does not fit and the way
            out. The backbone is unchanged then.
    """
    vit = backbone if isinstance(backbone, PackedViT) else None
    module: Any = vit or backbone.model
    target: dict[str, Tensor] = module.state_dict()  # shares the module's memory
    names = {plain_name(name, vit=vit is not None): name for name in weights.tensors}
    prefix = _find_prefix(names, target, place=weights.place)
    inside = {name[len(prefix) :]: old for name, old in names.items() if name.startswith(prefix)}
    heads = _heads(inside, target, module, vit=vit is not None)
    values = {name: weights.tensors[old] for name, old in inside.items() if name not in heads}

    notes = _fit_vit(values, target, vit, weights.place) if vit else _fit_timm(values, target, module)
    kept = [n for n in target if n not in values and n.rpartition(".")[2] in ("mask_token", "num_batches_tracked")]
    _check(values, target, kept, place=weights.place, vit=vit is not None)
    first: Any = vit.blocks[0] if vit else None
    own_heads = first.attn.num_heads if vit else None
    if None not in (own_heads, weights.num_heads) and own_heads != weights.num_heads:
        raise ValueError(
            f"{weights.place} has {weights.num_heads} attention heads and the backbone {own_heads}; set "
            f"method.num_heads: {weights.num_heads}"
        )
    for name, value in values.items():
        target[name].copy_(value)

    if kept:
        notes.append(f"not in it, so as initialised: {_list(n.rpartition('.')[2] for n in kept)}")
    if heads:
        notes.append(f"left out: {_list(n.partition('.')[0] for n in heads)}")
    if None not in (normalization, weights.normalization) and not _same(normalization, weights.normalization):
        notes.append(
            f"warning: it learned from pixels normalised by {weights.normalization}, and gets them normalised by "
            f"{normalization}"
        )
    count = sum(name in inside for name in values) if vit else len(values)
    line = f"{what}: {count} tensors from {weights.place}" + (f" ({prefix}*)" if prefix else "")
    return Loaded(prefix, "; ".join([line, *notes]))


def plain_name(name: str, *, vit: bool) -> str:
    """A name without what wrappers put into it; of a ViT, as timm has it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for pattern, replacement in (*_HEAD_NAMES, *(_VIT_NAMES if vit else ())):
        name = pattern.sub(replacement, name)
    return name


def _find_prefix(names: Collection[str], target: Mapping[str, Tensor], *, place: str) -> str:
    """What stands before the backbone's names in the source.

    Raises:
        ValueError: none of it is there, or several backbones are and none is the obvious one.
    """
    wanted = [name for name in target if name != "mask_token"]
    anchor = "patch_embed.proj.weight" if "patch_embed.proj.weight" in target else wanted[0]
    found = {name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")}
    if not found:
        some = f"its tensors are called {', '.join(sorted(names)[:3])}, …" if names else "it holds no tensor"
        raise ValueError(
            f"{place} does not hold this backbone: no {anchor} is in it ({some}); take the method.backbone that the "
            "weights are of"
        )

    def rank(prefix: str) -> tuple[int, int]:
        parts = set(prefix.split("."))
        return -sum(prefix + name in names for name in wanted), 0 if parts & _AVERAGED else 1 if parts & _FIRST else 2

    best = min(map(rank, found))
    chosen = sorted(prefix for prefix in found if rank(prefix) == best)
    if len(chosen) > 1:
        raise ValueError(
            f"{place} holds this backbone {len(chosen)} times, as {' and '.join(f'{p}*' for p in chosen)}; save the "
            "one that is meant in a file of its own"
        )
    return chosen[0]


def _heads(names: Iterable[str], target: Mapping[str, Tensor], module: Any, *, vit: bool) -> set[str]:
    """Names that have no part in a backbone's features: of a classifier, a projector or a decoder."""
    if vit:
        parts = _VIT_PARTS | {name.partition(".")[0] for name in target}
        return {name for name in names if name.partition(".")[0] not in parts}
    classifiers = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    known = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    # A head that is gone as a whole may hold more than its classifier.
    known += {c.partition(".")[0] for c in known} - {n.partition(".")[0] for n in target}
    return {n for n in names if n.startswith(tuple(f"{c}." for c in known)) and n not in target}


def _fit_timm(values: dict[str, Tensor], target: Mapping[str, Tensor], model: Any) -> list[str]:
    """Where the weights are not this model's as they are, let timm translate them (Swin's windows, older names)."""
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None or not _problems(values, target, kept=()):
        return []
    try:
        translated = dict(translate(dict(values), model))
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError):
        return []  # not what timm expects either: the check that follows says what does not fit
    values.clear()
    values.update(translated)
    return ["translated by timm"]


def _fit_vit(values: dict[str, Tensor], target: Mapping[str, Tensor], vit: PackedViT, place: str) -> list[str]:
    """Bring a ViT's tokens, positions and LayerScale to what this one has, where that changes no feature.

    Raises:
        ValueError: positions that are of no square grid.
    """
    notes = []
    token = values.pop("mask_token", None)  # a decoder's is of another width
    if token is not None and vit.mask_token is not None and token.numel() == vit.mask_token.numel():
        values["mask_token"] = token.reshape(vit.mask_token.shape)
    gammas = {name for name in target if name.endswith(".gamma")}
    if gammas and not any(name.endswith(".gamma") for name in values):
        values |= {name: torch.ones_like(target[name]) for name in gammas}
        notes.append("it has no LayerScale: factors of 1, which is the same")
    if vit.pos_embed is None or not {"cls_token", "pos_embed"} <= values.keys() or values["pos_embed"].ndim != 3:
        return notes

    cls, registers, positions = (values.get(name) for name in ("cls_token", "reg_token", "pos_embed"))
    assert cls is not None and positions is not None
    num_registers = 0 if registers is None else registers.shape[1]
    # How many tokens before the patches have positions: none, the class token, or registers too.
    fits = [n for n in (1, 0, 1 + num_registers) if _side(positions.shape[1] - n)]
    if not fits:
        raise ValueError(
            f"{place}: pos_embed has {positions.shape[1]} positions, which are no square grid of patches, with or "
            "without a class token"
        )
    had, side = fits[0], _side(positions.shape[1] - fits[0])
    if (side, side) != vit.grid_size:
        notes.append(f"positions resized from {side}×{side} to {'×'.join(map(str, vit.grid_size))}")
    positions = resize_positions(at_least_fp32(positions), num_prefix_tokens=had, old=(side, side), new=vit.grid_size)
    before, grid = positions[:, :had], positions[:, had:]
    want = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if want < had:  # a position is part of its token
        values["cls_token"] = cls + before[:, :1]
        if registers is not None and had > 1:
            values["reg_token"] = registers + before[:, 1:]
        before = before[:, :0]
    elif want > had:
        before = torch.cat([before, before.new_zeros(1, want - had, before.shape[2])], dim=1)
    values["pos_embed"] = torch.cat([before, grid], dim=1)
    return notes


def _side(num_patches: int) -> int:
    """Side of a square grid of so many patches; 0: there is none."""
    side = math.isqrt(max(num_patches, 0))
    return side if side * side == num_patches else 0


def _problems(values: Mapping[str, Tensor], target: Mapping[str, Tensor], *, kept: Collection[str]) -> list[str]:
    """What keeps the values from being the target's, a clause each."""
    found = []
    missing = [name for name in target if name not in values and name not in kept]
    extra = [name for name in values if name not in target]
    for verb, names in (("lacks", missing), ("has", extra)):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            found.append(
                f"{verb} {names[0]}{more}, unlike the backbone" if verb == "has" else f"{verb} {names[0]}{more}"
            )
    for name, tensor in target.items():
        value = values.get(name, tensor)
        if value.shape != tensor.shape:
            found.append(f"has {name} of shape {list(value.shape)} where the backbone's is {list(tensor.shape)}")
            break
        if value.is_floating_point() != tensor.is_floating_point():
            found.append(f"has {name} as {value.dtype} where the backbone's is {tensor.dtype}")
            break
    return found


def _check(
    values: Mapping[str, Tensor], target: Mapping[str, Tensor], kept: Collection[str], *, place: str, vit: bool
) -> None:
    """Raise unless the values are all of the target's and finite.

    Raises:
        ValueError: says what does not fit, and what to set.
    """
    problems = _problems(values, target, kept=kept)
    if problems:
        advice = (_vit_advice(values, target) if vit else "") or "take the method.backbone that the weights are of"
        raise ValueError(f"{place} {' and '.join(problems)}; {advice}")
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(f"{place}: {name} is not finite, so that run has diverged; take earlier weights")


def _vit_advice(values: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """The setting with which a ViT would be the weights' own, if it is one of the common ones."""

    def facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        patches, registers = tensors.get("patch_embed.proj.weight"), tensors.get("reg_token")
        return {
            "width": None if patches is None else patches.shape[0],
            "patch_size": None if patches is None else patches.shape[-1],
            "registers": 0 if registers is None else registers.shape[1],
            "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            "layer_scale": "1.0e-5" if any(name.endswith(".gamma") for name in tensors) else "null",
        }

    wanted, own = facts(values), facts(target)
    if wanted.pop("width") != own.pop("width"):
        return ""  # another width mostly means other heads, of which the shapes say nothing
    changes = [f"method.{key}: {value}" for key, value in wanted.items() if value not in (own[key], None)]
    return f"set {', '.join(changes)}, or take the method.backbone that the weights are of" if changes else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _same(a: Any, b: Any) -> bool:
    return all(abs(x - y) < 1e-3 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
