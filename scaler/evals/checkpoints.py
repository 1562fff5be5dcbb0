"""A model made ready to be evaluated: of a run, of a checkpoint, of timm, or of a file of weights.

model = load_for_evaluation("runs/dinov2", device="cpu")
model = load_for_evaluation("timm:vit_small_patch14_dinov2", image_size=224)
model = load_for_evaluation("dinov2_vits14.pth", backbone="vit_small_patch14_dinov2", image_size=224)
features, labels = model.features(index)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from scaler.checkpoint import load_method, read_manifest, resolve_checkpoint
from scaler.collectives import World
from scaler.evals.features import extract_features
from scaler.evals.knn import knn_accuracy
from scaler.methods.base import Method
from scaler.nn.backbones import Backbone, build_backbone
from scaler.nn.weights import Normalization, load_backbone_
from scaler.recipe import load_recipe, parse_recipe
from scaler.train import build_method
from scaler.weights import FILES, is_timm, read_weights, timm_config
from shards.decode import View
from shards.index import ShardIndex
from shards.places import Location, locate


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
    """

    method: Method
    image_size: int
    step: int | None
    device: torch.device
    line: str = ""

    def features(
        self, index: ShardIndex, *, batch_size: int = 256, num_workers: int = 0, crop_fraction: float = 0.875
    ) -> tuple[Tensor, Tensor]:
        """Features float32 [N, d] and labels int64 [N] of all samples, from centre crops of the model's image size."""
        view = View("center", self.image_size, kind="center", crop_fraction=crop_fraction)
        return extract_features(
            self.method.features,
            index,
            view=view,
            batch_size=batch_size,
            num_workers=num_workers,
            device=self.device,
            world=World(),
            normalization=self.method.normalization,
            title=f"features of {index.path.name}",
        )

    def knn(
        self, train: ShardIndex, val: ShardIndex, *, k: int = 20, temperature: float = 0.07, **options: Any
    ) -> dict[str, float]:
        """Weighted kNN accuracy (`top1`, `top5`) of `val` by its neighbours in `train`; `options` go to `features`.

        Raises:
            ValueError: shards without labels or of other classes than one another.
        """
        if train.class_names != val.class_names or not train.class_names:
            raise ValueError(
                f"kNN needs labels of the same classes: {train.path} has {len(train.class_names)} classes and "
                f"{val.path} {len(val.class_names)}; convert both from class folders of the same names"
            )
        (x, y), (queries, labels) = self.features(train, **options), self.features(val, **options)
        return knn_accuracy(x, y, queries, labels, k=k, temperature=temperature, num_classes=len(train.class_names))


def load_for_evaluation(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    random_init: bool = False,
    backbone: str | None = None,
    image_size: int | None = None,
) -> EvaluationModel:
    """The model of a run (its newest complete checkpoint), of one checkpoint, of timm (`timm:NAME` or a folder of its)
    or of a file of weights, URLs included.

    Args:
        device: None: the first GPU, or the CPU where there is none.
        random_init: keep random weights, those that a recipe's seed gives before training; a run needs no checkpoint
            then.
        backbone: timm's name of the model that a file of weights is of.
        image_size: pixels; None: the recipe's, or what timm gives for the model.

    Raises:
        ValueError: none of these, damaged files, another architecture, an image size on which the model does not run.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = _bare_name(str(source), backbone)
    step: int | None
    if name is None:
        method, step = _of_recipe(source, random_init=random_init)
        line = ""
    else:
        method, line = _bare(str(source), name, image_size=image_size, random_init=random_init)
        step = 0 if random_init else None
    if image_size is not None and name is None:
        method.views_at(image_size)  # or it says why not
    return EvaluationModel(
        method.eval().to(device), image_size=image_size or method.image_size, step=step, device=device, line=line
    )


def _of_recipe(source: str | Path, *, random_init: bool) -> tuple[Method, int]:
    """The method of a run or checkpoint, and its step."""
    if random_init and Path(source, "recipe.yaml").is_file():
        recipe = load_recipe(str(Path(source, "recipe.yaml")))
    else:
        folder = resolve_checkpoint(source)
        recipe = parse_recipe(read_manifest(folder)["recipe"], source=str(folder / "manifest.json"))
    method = build_method(recipe, world=World())
    return method, 0 if random_init else load_method(source, method)["step"]


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
