"""Scoring the model on held-out images while it is trained, and remembering which checkpoint was best.

Every rank scores its part of `data.val_shards`, each image exactly once: short ranks are padded with images of weight
0, and images that cannot be decoded are counted. Nothing is drawn, so training goes on as if it had not been
interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scaler.collectives import World
from scaler.evals.features import normalized
from scaler.methods.base import Method
from scaler.recipe import Recipe
from scaler.strategies import Strategy
from scaler.strategies.processes import ranks_per_node
from scaler.watch import Watch
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches


class Validation:
    """The evaluation of a run.

    Args:
        recipe: its `evaluate` and `data` sections.
        index: the labelled images.
        batch_size: images that a rank scores at a time.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        index: ShardIndex,
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

    def run(self, step: int, *, watch: Watch) -> dict[str, float]:
        """Score the model after `step` updates; called by all ranks together.

        Returns:
            `val/NAME`: the mean of each score of `Method.evaluate` over all images that can be decoded, and where there
            are any that cannot `val/rejected`, their number.

        Raises:
            ValueError: an image without a label, none that can be decoded, a shard that is missing or cut off.
        """
        self._method.eval()
        try:
            scores = self._score(step, watch)
        finally:
            self._method.train()
        if self.best is None or scores["val/top1"] > self.best["val/top1"]:
            self.best, self._since = {"step": step, **scores}, 0
            self._write()
        else:
            self._since += 1
        return scores

    def _score(self, step: int, watch: Watch) -> dict[str, float]:
        data = self._recipe.data
        view = View("center", data.image_size, kind="center", crop_fraction=self._recipe.evaluate.crop_fraction)
        batches = evaluation_batches(
            self._index,
            view=view,
            batch_size=self._batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            ranks_per_node=ranks_per_node(self._world.size),
            num_workers=data.num_workers,
            max_pixels=data.max_pixels,
        )
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros(2, dtype=torch.float64, device=self._device)  # scored, rejected
        for batch in batches:
            watch.beat("validate", step=step)
            labels, weights = batch["labels"], batch["weights"]
            if (unlabelled := (weights > 0) & (labels < 0)).any():
                sample = int(batch["ids"][unlabelled][0])
                raise ValueError(
                    f"{self._index.path}: sample {sample} has no label, and data.val_shards needs one for every image; "
                    "convert from a folder of class folders"
                )
            images = normalized(batch["images"].to(self._device, non_blocking=True), self._method.normalization)
            weight = weights.to(self._device, torch.float64)
            found = self._strategy("evaluate", images, labels.clamp(min=0).to(self._device))
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + torch.where(weight > 0, values.double(), 0.0).sum()
            count += torch.stack([weight.sum(), weight.new_tensor(len(batch["rejected"]))])
        names = sorted(sums)
        *totals, scored, rejected = self._world.sum_(torch.cat([torch.stack([sums[n] for n in names]), count])).tolist()
        if not scored:
            raise ValueError(f"{self._index.path}: no image of data.val_shards can be decoded")
        means = {f"val/{name}": total / scored for name, total in zip(names, totals, strict=True)}
        return means | ({"val/rejected": rejected} if rejected else {})

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
