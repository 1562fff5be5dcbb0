"""What is exported: a trained encoder as the plain model of timm's that it is, and what it is to be compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from scaler.checkpoint import read_manifest, resolve_checkpoint
from scaler.evals.checkpoints import EvaluationModel
from scaler.methods.base import Method
from scaler.nn.backbones import Backbone, TimmBackbone, set_small_stem_
from scaler.nn.vit import PackedViT
from scaler.nn.weights import Normalization
from scaler.weights import FILES, is_timm, timm_config
from shards.index import INDEX_NAME, ShardIndex
from shards.places import locate

Part = Literal["evaluated", "student"]

# Where methods keep what is trained, and a classifier; the first that is there counts.
_STUDENTS = ("student.backbone", "backbone")
_CLASSIFIERS: dict[Part, tuple[str, ...]] = {"evaluated": ("average.head", "head"), "student": ("head",)}


class PlainEncoder(nn.Module):
    """A timm model that gives all that is exported; whole or as a program of TorchScript or ONNX."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = TimmBackbone(model)
        self.classifier: nn.Module | None = model.get_classifier() if model.num_classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features [n, d], patch features [n, p, d] and of a classifier scores [n, c], of images [n, 3, h, w]."""
        cls, patches = self.encoder([images])[0]
        return (cls, patches) if self.classifier is None else (cls, patches, self.classifier(cls))


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, taken out of its method.

    Attributes:
        architecture: timm's name of the model, and `model_args` what its `create_model` takes to make this one.
        small_stem: whether it is a ResNet with the stem for small images, which no argument of timm's makes.
        model: that model, with the weights, in evaluation mode, float32 on the CPU.
        image_size: pixels of the images that it is for, and `normalization` their mean and deviation.
        patch_size: of a ViT.
        num_classes: of its classifier; 0: none. `class_names` are empty where nobody knows them any more.
        reference: what the source gives for images [n, 3, h, w], as `PlainEncoder` does.
    """

    architecture: str
    model_args: dict[str, Any]
    small_stem: bool
    model: Any
    image_size: int
    normalization: Normalization
    patch_size: int | None
    num_classes: int
    class_names: tuple[str, ...]
    reference: Callable[[Tensor], tuple[Tensor, ...]]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `reference` gives."""
        return ("features", "patches", "scores")[: 3 if self.num_classes else 2]


def take_encoder(
    source: str,
    evaluation: EvaluationModel,
    *,
    part: Part = "evaluated",
    classifier: bool = False,
    backbone: str | None = None,
) -> Encoder:
    """The encoder of an opened source as a plain timm model.

    Args:
        source: what `evaluation` was opened from, with `backbone` if it is a file of weights; it says which of timm's
            models it is.
        part: the network that evaluations use (a teacher, or an average, where there is one), or the trained one.
        classifier: with the linear classifier of a supervised run.

    Raises:
        ValueError: no such part, or no classifier.
    """
    method = evaluation.method.float().cpu().eval()
    modules = dict(method.named_modules())
    students = [modules[name] for name in _STUDENTS if name in modules]
    if part == "student" and (method.settings is None or not students):
        raise ValueError(f"{source} has no student: weights from elsewhere are one network; leave out --part")
    trained: Any = students[0] if part == "student" else method.evaluated_backbone()
    head = _classifier(method, modules, part=part) if classifier else None
    if classifier and head is None:
        raise ValueError(f"{source} has no classifier to export: only supervised runs have; leave out --classifier")

    architecture, arguments = _architecture(source, method, trained, backbone=backbone)
    small_stem = bool(getattr(method.settings, "small_stem", False))
    num_classes = 0 if head is None else head.out_features
    model: Any = timm.create_model(architecture, num_classes=num_classes, **arguments)
    if small_stem:
        set_small_stem_(TimmBackbone(model))
    state = (trained if isinstance(trained, PackedViT) else trained.model).state_dict()
    state.pop("mask_token", None)  # which evaluations never see
    if head is not None:
        place = model.pretrained_cfg["classifier"]
        state |= {f"{place}.weight": head.weight, f"{place}.bias": head.bias}
    model.load_state_dict(state, assign=True)  # no second copy of a large model

    @torch.no_grad()
    def reference(images: Tensor) -> tuple[Tensor, ...]:
        cls, patches = trained([images])[0]
        return (cls, patches) if head is None else (cls, patches, head(cls))

    return Encoder(
        architecture=architecture,
        model_args=arguments,
        small_stem=small_stem,
        model=model.eval().requires_grad_(False),
        image_size=evaluation.image_size,
        normalization=method.normalization,
        patch_size=trained.patch_size,
        num_classes=num_classes,
        class_names=_class_names(source, num_classes=num_classes),
        reference=reference,
    )


def find_origin(source: str) -> tuple[dict[str, Any] | None, Path | None]:
    """The checkpoint's manifest and its run directory, as far as a source has them."""
    if is_timm(source) or source.endswith(FILES) or timm_config(locate(source)) is not None:
        return None, None
    checkpoint = resolve_checkpoint(source)
    folders = [place for place in (locate(source), checkpoint.parent.parent) if isinstance(place, Path)]
    return read_manifest(checkpoint), next((f for f in folders if (f / "recipe.yaml").is_file()), None)


def _class_names(source: str, *, num_classes: int) -> tuple[str, ...]:
    """Those of the shards that a classifier was trained on, if they are still there; else none."""
    manifest, _ = find_origin(source)
    shards = locate(manifest["recipe"]["data"]["shards"]) if manifest and num_classes else None
    if manifest is None or not isinstance(shards, Path) or not (shards / INDEX_NAME).is_file():
        return ()
    index = ShardIndex.load(shards)
    fits = index.fingerprint == manifest.get("fingerprint") and len(index.class_names) == num_classes
    return tuple(index.class_names) if fits else ()


def _classifier(method: Method, modules: dict[str, nn.Module], *, part: Part) -> nn.Linear | None:
    """The linear layer that classifies, among a method's modules."""
    for name in _CLASSIFIERS[part]:
        head = modules.get(name)
        if isinstance(head, nn.Linear) and head.out_features == getattr(method.settings, "num_classes", None):
            return head
    return None


def _architecture(
    source: str, method: Method, trained: Backbone, *, backbone: str | None
) -> tuple[str, dict[str, Any]]:
    """timm's name of a backbone, and the arguments that make it; a ViT's are read off the model itself."""
    settings = method.settings
    saved: dict[str, Any] = {}  # what a folder of timm's says
    if settings is not None:
        name = settings.backbone
    elif is_timm(source):
        name = source.partition(":")[2] or backbone
    elif (config := None if source.endswith(FILES) else timm_config(locate(source))) is not None:
        name, saved = backbone or config["architecture"], dict(config.get("model_args", {}))
        saved.pop("num_classes", None)
    else:
        name = backbone
    architecture = str(name).partition(".")[0]  # without the tag of timm's own weights
    if isinstance(trained, PackedViT):
        return architecture, {**saved, **_vit_arguments(trained)}
    overrides = {key: getattr(settings, key, None) for key in ("depth", "embed_dim", "num_heads")}
    if trained.fixed_size:
        overrides["img_size"] = method.image_size
    return architecture, {**saved, **{key: value for key, value in overrides.items() if value is not None}}


def _vit_arguments(vit: PackedViT) -> dict[str, Any]:
    first: Any = vit.blocks[0]
    registers = 0 if vit.reg_token is None else vit.reg_token.shape[1]
    return {
        "img_size": [side * vit.patch_size for side in vit.grid_size],
        "patch_size": vit.patch_size,
        "embed_dim": vit.num_features,
        "depth": len(vit.blocks),
        "num_heads": first.attn.num_heads,
        "reg_tokens": registers,
        "no_embed_class": vit.no_embed_class,
        "dynamic_img_size": True,
        # That there is LayerScale at all; its factors are weights.
        **({"init_values": 1.0} if hasattr(first.ls1, "gamma") else {}),
    }
