"""A checkpoint made ready to be evaluated: its recipe, its method with its weights, and features from shards.

model = load_for_evaluation("runs/dinov2", device="cpu")
features, labels = model.features(index)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaler.checkpoint import load_method, read_manifest, resolve_checkpoint
from scaler.collectives import World
from scaler.evals.features import extract_features
from scaler.evals.knn import knn_accuracy
from scaler.methods.base import Method
from scaler.recipe import Recipe, load_recipe, parse_recipe
from scaler.train import build_method
from shards.decode import View
from shards.index import ShardIndex


@dataclass(frozen=True)
class EvaluationModel:
    """A method in evaluation mode on its device, with the recipe that made it."""

    method: Method
    recipe: Recipe
    step: int  # 0: before training
    device: torch.device

    def features(
        self, index: ShardIndex, *, batch_size: int = 256, num_workers: int = 0, crop_fraction: float = 0.875
    ) -> tuple[Tensor, Tensor]:
        """Features float32 [N, d] and labels int64 [N] of all samples, from centre crops of the recipe's image size."""
        view = View("center", self.recipe.data.image_size, kind="center", crop_fraction=crop_fraction)
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
    path: str | Path, *, device: torch.device | str | None = None, random_init: bool = False
) -> EvaluationModel:
    """The model of a run directory (its newest complete checkpoint) or of one checkpoint, URLs included.

    Args:
        device: None: the first GPU, or the CPU where there is none.
        random_init: keep the weights that the recipe's seed gives before training; a run needs no checkpoint then.

    Raises:
        ValueError: neither a run nor a checkpoint, damaged files, another architecture.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if random_init and Path(path, "recipe.yaml").is_file():
        recipe = load_recipe(str(Path(path, "recipe.yaml")))
    else:
        folder = resolve_checkpoint(path)
        recipe = parse_recipe(read_manifest(folder)["recipe"], source=str(folder / "manifest.json"))
    method = build_method(recipe, world=World())
    step = 0 if random_init else load_method(path, method)["step"]
    return EvaluationModel(method.eval().to(device), recipe, step=step, device=device)
