"""Scoring the model on held-out images while it is trained, and remembering which checkpoint was best.

Every rank scores its part of `data.val_shards`, each image exactly once: short ranks are padded with images of weight
0, and images that cannot be decoded are counted. A method with a classifier is scored by it; the features of any other
by a kNN among labelled training images. Nothing is drawn, so training goes on as if it had not been interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaler.collectives import World
from scaler.evals.features import Part, feature_batches
from scaler.evals.knn import knn_scores
from scaler.evals.scores import mean_scores
from scaler.methods.base import Method
from scaler.recipe import Recipe
from scaler.strategies import Strategy
from scaler.strategies.processes import ranks_per_node
from scaler.watch import Watch
from shards.decode import View
from shards.index import ShardIndex
from shards.order import Ints


class Validation:
    """The evaluation of a run.

    Args:
        recipe: its `evaluate` and `data` sections.
        index: the labelled images.
        train: labelled training images, by which those of a method without a classifier are classified; None: by each
            other.
        batch_size: images that a rank scores at a time.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        index: ShardIndex,
        train: ShardIndex | None,
        method: Method,
        strategy: Strategy,
        batch_size: int,
        world: World,
        device: torch.device,
    ) -> None:
        self.every = recipe.evaluate.every or "1 epochs"
        self.best: dict[str, Any] | None = None  # step and scores
        self._since = 0  # evaluations since then
        self._recipe, self._index, self._batch_size = recipe, index, batch_size
        self._method, self._strategy, self._world, self._device = method, strategy, world, device
        self._train = train
        if not method.validates:
            wanted = [index] if train is None else [index, train]
            labelled = [np.flatnonzero(part.labels(np.arange(part.num_samples)) >= 0) for part in wanted]
            if len(labelled[0]) < index.num_samples:
                raise ValueError(
                    f"{index.path}: {index.num_samples - len(labelled[0])} images of data.val_shards have no label"
                )
            self._neighbours = evenly_spread(labelled[-1], recipe.evaluate.neighbours)

    def describe(self) -> str:
        """What is scored, when and how, for the user."""
        how = "by the classifier"
        if not self._method.validates:
            how = f"by a kNN among {len(self._neighbours)} training images"
            if self._train is None:
                how = "by a kNN among themselves, since the training images have no labels"
        return f"evaluation: every {self.every}, {self._index.num_samples} images {how}"

    def run(self, step: int, *, watch: Watch) -> dict[str, float]:
        """Score the model after `step` updates; called by all ranks together.

        Returns:
            `val/NAME`: the mean of each score of `Method.evaluate`, or `top1` and `top5` of a kNN, over all images that
            can be decoded, and where there are any that cannot `val/rejected`, their number.

        Raises:
            ValueError: an image without a label, none that can be decoded, a shard that is missing or cut off.
        """
        self._method.eval()
        try:
            scores = self._score(partial(watch.beat, "validate", step=step))
        finally:
            self._method.train()
        if self.best is None or scores["val/top1"] > self.best["val/top1"]:
            self.best, self._since = {"step": step, **scores}, 0
            self._write()
        else:
            self._since += 1
        return scores

    def _score(self, beat: Callable[[], None]) -> dict[str, float]:
        if not self._method.validates:
            return self._knn(beat)
        means, rejected = mean_scores(
            partial(self._strategy, "evaluate"),
            self._index,
            world=self._world,
            device=self._device,
            normalization=self._method.normalization,
            beat=beat,
            **self._options(),
        )
        return {f"val/{name}": mean for name, mean in means.items()} | _rejected(rejected)

    def _knn(self, beat: Callable[[], None]) -> dict[str, float]:
        """kNN of held-out images by training images, or, where those have no labels, by the other held-out ones."""
        val, rejected = self._features(self._index, None, beat)
        train = val if self._train is None else self._features(self._train, self._neighbours, beat)[0]
        facts = [len(train.ids), len(val.ids), *(int(not part.features.isfinite().all()) for part in (train, val))]
        num_train, num_val, *diverged = self._world.sum_(torch.tensor(facts, device=self._device)).tolist()
        leave_out = self._train is None
        if not num_val or num_train <= leave_out:
            raise ValueError(f"{self._index.path}: too few images can be decoded for a kNN among them")
        if any(diverged):  # which the loss will tell, or has told; nothing can be classified by such features
            return {"val/top1": 0.0, "val/top5": 0.0} | _rejected(rejected)
        k = min(self._recipe.evaluate.k, num_train - leave_out)
        classes = len(self._index.class_names)
        scores = knn_scores(train, val, ks=[k], num_classes=classes, world=self._world, leave_out=leave_out)[k]
        return {f"val/{name}": score for name, score in scores.items()} | _rejected(rejected)

    def _features(self, index: ShardIndex, ids: Ints | None, beat: Callable[[], None]) -> tuple[Part, int]:
        """This rank's features of these samples (None: all) on the device, and how many of the samples of all ranks
        cannot be decoded."""
        parts, bad = [], 0
        batches = feature_batches(
            partial(self._strategy, "features"),
            index,
            device=self._device,
            normalization=self._method.normalization,
            ids=ids,
            rank=self._world.rank,
            world_size=self._world.size,
            **self._options(),
        )
        for part, rejected in batches:
            beat()
            parts.append(part.to(self._device))
            bad += len(rejected)
        (total,) = self._world.sum_(torch.tensor([bad], device=self._device)).tolist()
        return Part(*(torch.cat(column) for column in zip(*parts, strict=True))), total

    def _options(self) -> dict[str, Any]:
        """Of the batches."""
        data = self._recipe.data
        crop_fraction = self._recipe.evaluate.crop_fraction
        return {
            "view": View("center", data.image_size, kind="center", crop_fraction=crop_fraction),
            "batch_size": self._batch_size,
            "ranks_per_node": ranks_per_node(self._world.size),
            "num_workers": data.num_workers,
            "max_pixels": data.max_pixels,
        }

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is to be kept as the best; None: none is."""
        return self.best["step"] if self.best is not None and self._recipe.checkpoint.keep_best else None

    @property
    def exhausted(self) -> bool:
        """Whether `evaluate.patience` is."""
        patience = self._recipe.evaluate.patience
        return patience is not None and self._since >= patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"best": self.best, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self.best, self._since = state["best"], state["since"]
        self._write()

    def _write(self) -> None:
        """RUN/best.json: which step was best, with what scores."""
        if self._world.rank == 0 and self.best is not None:
            path = Path(self._recipe.run.dir, "best.json")
            temporary = path.with_name(".best.json.tmp")
            temporary.write_text(json.dumps(self.best) + "\n")
            temporary.replace(path)


def evenly_spread(ids: Ints, count: int) -> Ints:
    """At most `count` of the ids, as far apart as they can be."""
    count = min(count, len(ids))
    return ids[np.arange(count) * len(ids) // max(count, 1)]


def _rejected(count: int) -> dict[str, float]:
    return {"val/rejected": count} if count else {}
