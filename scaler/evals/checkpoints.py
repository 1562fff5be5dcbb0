"""A model made ready to be evaluated: of a run, of a checkpoint, of timm, or of a file of weights.

model = load_for_evaluation("runs/dinov2", device="cpu")
model = load_for_evaluation("timm:vit_small_patch14_dinov2", image_size=224)
model = load_for_evaluation("dinov2_vits14.pth", backbone="vit_small_patch14_dinov2", image_size=224)
features, labels = model.features(index)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from scaler.checkpoint import load_method, read_manifest, resolve_checkpoint
from scaler.collectives import World
from scaler.evals.features import Extraction, extract_part
from scaler.evals.knn import knn_scores
from scaler.evals.store import FeatureStore, Kept, tensors_digest
from scaler.methods.base import Method
from scaler.nn.backbones import Backbone, build_backbone
from scaler.nn.vit import PackedViT
from scaler.nn.weights import Normalization, load_backbone_
from scaler.recipe import load_recipe, parse_recipe
from scaler.train import build_method
from scaler.weights import FILES, is_timm, read_weights, timm_config
from shards.decode import View
from shards.index import ShardIndex
from shards.places import Location, locate

_BLOCKS = 4  # of a ViT that a linear classifier may see, as in DINOv2
_FEATURES_FORMAT = 1  # counts changes of what features mean here


class BareBackbone(Method):
    """A backbone without the method that trained it; it has features only."""

    def __init__(self, backbone: Backbone, *, image_size: int, normalization: Any) -> None:
        super().__init__(None, image_size=image_size, world=World())
        self.backbone, self.normalization = backbone, normalization

    def evaluated_backbone(self) -> Backbone:
        """See `Method.evaluated_backbone`."""
        return self.backbone


@dataclass(frozen=True)
class EvaluationModel:
    """A method in evaluation mode on its device.

    Attributes:
        image_size: pixels of the images that it is given.
        step: of the checkpoint; 0: before training, None: weights from elsewhere.
        line: which weights those are, for the user.
        precision: fp32, or bf16: of matrix products and convolutions, features stay float32.
        trained_on: `data.shards` of a run's recipe.
    """

    method: Method
    image_size: int
    step: int | None
    device: torch.device
    line: str = ""
    precision: str = "fp32"
    trained_on: str | None = None

    def features(
        self, index: ShardIndex, *, batch_size: int = 256, num_workers: int = 0, crop_fraction: float = 0.875
    ) -> tuple[Tensor, Tensor]:
        """Features float32 [N, d] and labels int64 [N] of all samples, from centre crops of the model's image size."""
        found = self.extract(index, batch_size=batch_size, num_workers=num_workers, crop_fraction=crop_fraction)
        return found.part.features, found.part.labels

    def extract(
        self,
        index: ShardIndex,
        *,
        layers: bool = False,
        batch_size: int = 256,
        num_workers: int = 0,
        crop_fraction: float = 0.875,
        kept: Kept | None = None,
        world: World | None = None,
        ranks_per_node: int = 1,
        name: str | None = None,
    ) -> Extraction:
        """This rank's part of the features of all samples, from centre crops; called by all ranks together.

        Args:
            layers: those of `layer_inputs` instead of the one feature that kNN uses.
            kept: where features lie that were made before, by the content of weights, images and settings.
            name: of the images, for the progress bar.
        """
        view = View("center", self.image_size, kind="center", crop_fraction=crop_fraction)
        layers = layers and isinstance(self.method.evaluated_backbone(), PackedViT)
        store = None if kept is None else FeatureStore(kept, self._facts(index, view, layers=layers))
        return extract_part(
            self._layers if layers else self._pooled,
            index,
            view=view,
            batch_size=batch_size,
            num_workers=num_workers,
            device=self.device,
            world=world or World(),
            ranks_per_node=ranks_per_node,
            normalization=self.method.normalization,
            title=f"features of {name or index.path.name}",
            store=store,
        )

    def layer_inputs(self) -> dict[str, slice]:
        """What a linear classifier may see, by name, as columns of `extract(layers=True)`: of a ViT the class tokens of
        its last block or its last four, with or without the mean of the last patches; else the one feature.
        """
        backbone = self.method.evaluated_backbone()
        if not isinstance(backbone, PackedViT):
            return {"pooled": slice(None)}
        count, d = min(_BLOCKS, len(backbone.blocks)), backbone.num_features
        found: dict[str, slice] = {}
        for blocks in (1, count) if count > 1 else (1,):
            name, first = f"{blocks} block{'s' if blocks > 1 else ''}", (count - blocks) * d
            found |= {name: slice(first, count * d), f"{name} + patches": slice(first, (count + 1) * d)}
        return found

    def knn(
        self, train: ShardIndex, val: ShardIndex, *, k: int = 20, temperature: float = 0.07, **options: Any
    ) -> dict[str, float]:
        """Weighted kNN accuracy (`top1`, `top5`) of `val` by its neighbours in `train`; `options` go to `extract`.

        Raises:
            ValueError: shards without labels or of other classes than one another.
        """
        to_train = common_labels(train, val)
        parts = [self.extract(index, **options).part.to(self.device) for index in (train, val)]
        parts[1] = parts[1]._replace(labels=to_train.to(self.device)[parts[1].labels])
        count = len(train.class_names)
        return knn_scores(*parts, ks=[k], temperature=temperature, num_classes=count, world=options.get("world"))[k]

    @cached_property
    def sha256(self) -> str:
        """Of the weights that are evaluated."""
        return tensors_digest(self.method.evaluated_backbone().state_dict())

    def _facts(self, index: ShardIndex, view: View, *, layers: bool) -> dict[str, Any]:
        """All that features depend on."""
        backbone = self.method.evaluated_backbone()
        heads = [getattr(module, "num_heads", None) for module in backbone.modules()]  # which no printout shows
        return {
            "format": _FEATURES_FORMAT,
            "weights": self.sha256,
            "architecture": hashlib.sha256(f"{backbone!r} {heads}".encode()).hexdigest(),
            "features": "layers" if layers else "pooled",
            "images": index.fingerprint,
            "image_size": view.size,
            "crop_fraction": view.crop_fraction,
            "normalization": self.method.normalization,
            "precision": self.precision,
            "device": self.device.type,
            "versions": {name: metadata.version(name) for name in ("scaler", "torch", "timm")},
        }

    def classified(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`Method.evaluate` in the model's precision."""
        with self._autocast():
            return self.method.evaluate(images, labels)

    def _pooled(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.method.features(images)

    def _layers(self, images: Tensor) -> Tensor:
        backbone = self.method.evaluated_backbone()
        assert isinstance(backbone, PackedViT)
        with self._autocast():
            return last_blocks(backbone, images, count=min(_BLOCKS, len(backbone.blocks)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def last_blocks(vit: PackedViT, images: Tensor, *, count: int) -> Tensor:
    """[n, (count + 1) · d]: class tokens of the last `count` blocks after the final norm, earliest first, and the mean
    of the last block's patches.
    """
    tokens = vit.embed(images)
    shape = tokens.shape
    x, out = tokens.flatten(0, 1), []
    for number, block in enumerate(vit.blocks):
        x = block(x, [(shape[0], shape[1])])
        if number >= len(vit.blocks) - count:
            out.append(vit.norm(x).view(shape))
    return torch.cat([*(t[:, 0] for t in out), out[-1][:, vit.num_prefix_tokens :].mean(dim=1)], dim=1)


def common_labels(train: ShardIndex, val: ShardIndex) -> Tensor:
    """The label in `train` of each class of `val`, by name, int64 [classes of val].

    Raises:
        ValueError: no labels, an image without one, or classes of `val` that `train` does not have.
    """
    unknown = [name for name in val.class_names if name not in set(train.class_names)]
    if not train.class_names or not val.class_names or unknown:
        what = f"; {train.path} has no {unknown[0]!r}" if unknown and train.class_names else ""
        raise ValueError(
            f"labels of the same classes are needed: {train.path} has {len(train.class_names)} classes and "
            f"{val.path} {len(val.class_names)}{what}; convert both from class folders of the same names"
        )
    for index in (train, val):
        if (missing := np.flatnonzero(index.labels(np.arange(index.num_samples)) < 0)).size:
            (key,) = index.keys(missing[:1])
            raise ValueError(f"{missing.size} samples of {index.path} have no label, the first {key}; leave them out")
    places = {name: number for number, name in enumerate(train.class_names)}
    return torch.tensor([places[name] for name in val.class_names])


def load_for_evaluation(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    random_init: bool = False,
    backbone: str | None = None,
    image_size: int | None = None,
    precision: str = "fp32",
) -> EvaluationModel:
    """The model of a run (its newest complete checkpoint), of one checkpoint, of timm (`timm:NAME` or a folder of its)
    or of a file of weights, URLs included.

    Args:
        device: None: the first GPU, or the CPU where there is none.
        random_init: keep random weights, those that a recipe's seed gives before training; a run needs no checkpoint
            then.
        backbone: timm's name of the model that a file of weights is of.
        image_size: pixels; None: the recipe's, or what timm gives for the model.
        precision: see `EvaluationModel`.

    Raises:
        ValueError: none of these, damaged files, another architecture, an image size on which the model does not run.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = _bare_name(str(source), backbone)
    step: int | None
    if name is None:
        method, step, trained_on = _of_recipe(source, random_init=random_init)
        line = ""
    else:
        method, line = _bare(str(source), name, image_size=image_size, random_init=random_init)
        step, trained_on = 0 if random_init else None, None
    if image_size is not None and name is None:
        method.views_at(image_size)  # or it says why not
    size = image_size or method.image_size
    return EvaluationModel(
        method.eval().to(device),
        image_size=size,
        step=step,
        device=device,
        line=line,
        precision=precision,
        trained_on=trained_on,
    )


def _of_recipe(source: str | Path, *, random_init: bool) -> tuple[Method, int, str]:
    """The method of a run or checkpoint, its step, and the shards that it was trained on."""
    if random_init and Path(source, "recipe.yaml").is_file():
        recipe, folder = load_recipe(str(Path(source, "recipe.yaml"))), locate(source)
    else:
        folder = resolve_checkpoint(source)  # once: a run that is still training may save another one meanwhile
        recipe = parse_recipe(read_manifest(folder)["recipe"], source=str(folder / "manifest.json"))
    method = build_method(recipe, world=World())
    step = 0 if random_init else load_method(folder, method)["step"]
    return method, step, recipe.data.shards


def _bare_name(source: str, backbone: str | None) -> str | None:
    """timm's name of the backbone that a source other than a run or a checkpoint is of; None: it is one of these.

    Raises:
        ValueError: a backbone is needed and none given, or the other way round.
    """
    found: Any = None
    if is_timm(source):
        found = source.partition(":")[2] or backbone
    else:
        place: Location = locate(source)
        if place.name.endswith(FILES):
            found = backbone
        elif (config := timm_config(place)) is not None:
            found = backbone or config["architecture"]
        elif backbone is not None:
            raise ValueError(f"{source} is a run or a checkpoint, which knows its backbone: leave {backbone} out")
        else:
            return None
    if found is None:
        raise ValueError(f"{source} does not say what it is of: give timm's name of the model (--backbone)")
    return str(found)


def _bare(source: str, name: str, *, image_size: int | None, random_init: bool) -> tuple[Method, str]:
    """A backbone with weights from elsewhere, and a line that says which."""
    config = timm.get_pretrained_cfg(name)
    normalization: Normalization = Method.normalization
    if config is not None and (is_timm(source) or random_init):
        normalization = (tuple(config.mean), tuple(config.std))
    size = image_size or (224 if config is None else config.input_size[-1])
    saved = None if is_timm(source) or source.endswith(FILES) else timm_config(locate(source))
    arguments: dict[str, Any] = {}
    if saved is not None:  # a folder says how its model was made
        size = image_size or saved["pretrained_cfg"].get("input_size", (size,))[-1]
        arguments = backbone_arguments(saved.get("model_args", {}))
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=size, **arguments)
    line = f"random weights of {name}"
    if not random_init:
        weights = read_weights(source, backbone=name)
        normalization = weights.normalization or normalization
        line = load_backbone_(backbone, weights).line
    return BareBackbone(backbone, image_size=size, normalization=normalization), line


def backbone_arguments(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What `build_backbone` is to be told, of the arguments that a folder of timm's keeps for its model."""
    rest = dict(model_args)
    for key in ("img_size", "dynamic_img_size", "num_classes"):  # given, or of the head
        rest.pop(key, None)
    registers, layer_scale = rest.pop("reg_tokens", 0), rest.pop("init_values", None)
    if registers:  # these get no position; where the folder's have one, it becomes part of them
        rest.pop("no_embed_class", None)
    return {**rest, "registers": registers, "layer_scale": layer_scale}
