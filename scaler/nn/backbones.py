"""Backbones from timm by name.

    backbone = build_backbone("vit_small_patch16_224", image_size=224, layer_scale=1e-5, drop_path=0.3)
    features = backbone([global_crops, local_crops])           # one pass over crops of both sizes
    blocks = backbone.blocks()                                 # units to shard, checkpoint and compile

Plain ViTs become `PackedViT`, freshly initialised as in DINOv2; every other model runs as timm has it, with timm's
initial weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import is_model, list_models, model_entrypoint
from timm.models.resnet import ResNet
from torch import Tensor, nn

from scaler.nn.base import Backbone, Features
from scaler.nn.init import InitialWeights, init_vit_
from scaler.nn.vit import PackedViT, can_pack

__all__ = ["Backbone", "Features", "TimmBackbone", "build_backbone", "check_image_size", "set_small_stem_"]


def build_backbone(
    name: str,
    *,
    image_size: int,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    registers: int = 0,
    patch_size: int | None = None,
    mask_token: bool = False,
    initial_weights: InitialWeights = "published",
    **overrides: Any,
) -> Backbone:
    """Build a timm model without classifier.

    Args:
        name: timm's name of the model.
        image_size: pixels of the (global) crops, which sets a ViT's position embedding.
        drop_path: stochastic depth. ViTs take the rows to run in `forward(keep=…)`; others use timm's, per sample.
        layer_scale: initial value of a ViT's LayerScale; None: as the model has it, mostly none.
        registers: number of register tokens of a ViT (arXiv 2309.16588), which get no position.
        patch_size: another patch size than the name's.
        mask_token: give a ViT a mask token.
        initial_weights: of a ViT, see `scaler.nn.init.init_linear_`.
        overrides: further arguments of timm's model (`depth`, `embed_dim`, `num_heads`, …); None: the name's own.

    Raises:
        ValueError: unknown model, an override that the model does not take, or a ViT's option for another model.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    check_model_name(name)
    if _packs(name):
        options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "init_values": layer_scale}
        if layer_scale is None:
            del options["init_values"]
        if patch_size is not None:
            options["patch_size"] = patch_size
        if registers:
            options |= {"reg_tokens": registers, "no_embed_class": True}
        model = _create(name, **options, **overrides)
        if can_pack(model):
            check_image_size(image_size, patch_size=model.patch_embed.patch_size[0], name=name)
            vit = PackedViT(model, drop_path=drop_path, mask_token=mask_token)
            init_vit_(vit, layer_scale=layer_scale, weights=initial_weights)
            return vit
    wanted = {"layer_scale": layer_scale, "registers": registers, "patch_size": patch_size, "mask_token": mask_token}
    refused = [option for option, value in wanted.items() if value]
    if refused:
        raise ValueError(f"{name} is no plain ViT and has no {', '.join(refused)}; take a vit_* model, or leave it out")
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        overrides = {"img_size": image_size, **overrides}
    if drop_path:  # which some models do not know of
        overrides = {"drop_path_rate": drop_path, **overrides}
    model = _create(name, **overrides)
    return TimmBackbone(model, drop_path=drop_path, fixed_size=config is not None and config.fixed_input_size)


def check_model_name(name: str) -> None:
    """Refuse what timm has no model of.

    Raises:
        ValueError: names close ones.
    """
    if not is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def check_image_size(image_size: int, *, patch_size: int, name: str) -> None:
    """Refuse images that a ViT cannot cut into whole patches.

    Raises:
        ValueError: names the patch size.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch_size} of {name}")


class TimmBackbone(Backbone):
    """Any other timm model, called as it is, one crop size after the other.

    On a GPU images whose first layer is a convolution reach it with their channels last: then every convolution, norm
    and sum after it has its channels last too, though the weights have not, and cuDNN converts nothing but these. On a
    CPU that is no rule: measured, ResNet-50 gained a little and ResNet-18 lost.
    """

    is_vit = False
    patch_size = None

    def __init__(self, model: Any, *, drop_path: float = 0.0, fixed_size: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.fixed_size = fixed_size
        self.num_features = model.head_hidden_size
        self.drop_path = drop_path
        first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
        self.channels_last = isinstance(first, nn.Conv2d)
        self.stem = Stem(model) if isinstance(model, ResNet) else None

    def forward(
        self,
        crops: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """See `Backbone.forward`; masks and kept rows are for ViTs."""
        if keep is not None or any(mask is not None for mask in masks or ()):
            raise ValueError(f"{type(self.model).__name__} takes neither masks nor kept rows; use a vit_* model")
        return [self._features(x) for x in crops]

    def _features(self, images: Tensor) -> Features:
        if self.channels_last and images.is_cuda:  # which those of `augment` are
            images = images.contiguous(memory_format=torch.channels_last)
        last = self._last(images)
        cls = self.model.forward_head(last, pre_logits=True)
        if last.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            patches = last.flatten(1, 2) if channels_last else last.flatten(2).transpose(1, 2)
        else:
            patches = last[:, getattr(self.model, "num_prefix_tokens", 0) :]
        return Features(cls=cls, patches=patches)

    def _last(self, images: Tensor) -> Tensor:
        """What the model makes of images before it pools."""
        if self.stem is None:
            last: Tensor = self.model.forward_features(images)
            return last
        x: Tensor = self.stem(images)
        for i in range(1, 5):
            x = getattr(self.model, f"layer{i}")(x)
        return x

    def blocks(self) -> list[nn.Module]:
        """Residual blocks where the model has stages of them (ResNet, ConvNeXt, Swin, …), else its direct children."""
        model = self.model
        stages = [getattr(model, f"layer{i}") for i in range(1, 5) if hasattr(model, f"layer{i}")]  # ResNet's names
        stages = stages or [s for key in ("stages", "layers", "blocks") for s in getattr(model, key, ())]
        found: list[nn.Module] = []
        for stage in stages:
            inner = getattr(stage, "blocks", stage)
            found += list(inner) if isinstance(inner, nn.Sequential | nn.ModuleList) else [stage]
        return found or [child for child in model.children() if any(True for _ in child.parameters())]


class Stem(nn.Module):
    """What a ResNet does before its blocks, as one unit to compile: there its activations are largest. The layers stay
    the model's: this has no parameters.
    """

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that they do not come to be here too

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] → what the first block gets."""
        model: Any = self._model[0]
        x: Tensor = model.maxpool(model.act1(model.bn1(model.conv1(images))))
        return x


def set_small_stem_(backbone: Backbone) -> None:
    """Give a ResNet the stem for small images (SimCLR's on CIFAR): one 3x3 convolution, no stride, no pooling.

    Raises:
        ValueError: a model without the stem of timm's ResNets.
    """
    model: Any = backbone.model if isinstance(backbone, TimmBackbone) else None
    if not isinstance(model, ResNet):
        raise ValueError("method.small_stem is for timm's ResNets; leave it off")
    stem = nn.Conv2d(3, int(model.bn1.num_features), kernel_size=3, padding=1, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.add_module("conv1", stem)
    model.add_module("maxpool", nn.Identity())


def _packs(name: str) -> bool:
    """Whether the model may be a plain ViT, and so takes the arguments of one."""
    return model_entrypoint(name).__module__ in ("timm.models.vision_transformer", "timm.models.deit")


def _create(name: str, **options: Any) -> Any:
    try:
        return timm.create_model(name, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take these settings: {error}") from None
