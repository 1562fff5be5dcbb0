"""Whole evaluations: a model and images in, one record out, which `scaler eval` prints and keeps.

    records = Evaluation(model, source="runs/first", val=val, train=train, world=world, kept=Kept())
    record = records.knn(ks=[10, 20], temperature=0.07)
    keep_record(record, source="runs/first")                 # RUN/evaluations/knn-step-00001000-….json

A record is flat JSON: what was evaluated (`source`, `step`, `weights_sha256`), on what (`train`, `train_fingerprint`,
`train_samples`, the same for `val`), how (`k`, `image_size`, …), `top1` and the other scores, a `table` where there is
more than one, `images_per_second` of feature extraction, `versions` and `date`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from scaler.collectives import World
from scaler.evals.checkpoints import EvaluationModel, common_labels
from scaler.evals.features import Part
from scaler.evals.images import open_images
from scaler.evals.knn import knn_scores
from scaler.evals.linear import linear_scores
from scaler.evals.scores import mean_scores
from scaler.evals.store import Kept
from shards.decode import View
from shards.index import ShardIndex
from shards.storage import write_atomic


@dataclass(frozen=True)
class Images:
    """Images to evaluate with, and where the user said they are."""

    place: str
    index: ShardIndex


@dataclass
class Evaluation:
    """One model on one set of images; every method is called by all ranks together and gives a record to each.

    Attributes:
        train: labelled images to learn from; None: for the model's own classifier.
        kept: where features are kept; None: nowhere.
        say: told what is worth a line.
    """

    model: EvaluationModel
    source: str
    val: Images
    train: Images | None = None
    world: World = field(default_factory=World)
    kept: Kept | None = None
    batch_size: int = 256
    num_workers: int = 0
    crop_fraction: float = 0.875
    ranks_per_node: int = 1
    say: Callable[[str], None] = lambda line: None

    def knn(self, *, ks: Sequence[int], temperature: float = 0.07) -> dict[str, Any]:
        """Weighted kNN accuracy for each k; `top1` and `top5` are the first one's.

        Raises:
            ValueError: images without labels, or of classes that the training images do not have; a k that is too
                large; what `extract_part` raises.
        """
        train, val, classes, rate = self._parts(layers=False)
        device = self.model.device
        scores = knn_scores(
            train.to(device), val.to(device), ks=ks, temperature=temperature, num_classes=classes, world=self.world
        )
        table = [{"k": k, **scores[k]} for k in ks]
        return self._record("knn", k=ks[0], temperature=temperature, **scores[ks[0]], table=table, **rate)

    def linear(self, **options: Any) -> dict[str, Any]:
        """Accuracy of the best of a grid of linear classifiers; see `linear_scores`, which gets the options.

        Raises:
            ValueError: as `knn`, and from `linear_scores`.
        """
        train, val, classes, rate = self._parts(layers=True)
        inputs = self.model.layer_inputs()
        found = linear_scores(
            train,
            val,
            inputs=inputs,
            num_classes=classes,
            device=self.model.device,
            world=self.world,
            **options,
        )
        best = found.grid[0]
        table = [{**vars(row), "loss": row.loss if math.isfinite(row.loss) else None} for row in found.grid]
        chosen = {"input": best.input, "lr": best.lr, "held_out_top1": best.top1}
        return self._record("linear", **chosen, **options, **found.scores, table=table, **rate)

    def classifier(self) -> dict[str, Any]:
        """Mean scores of the model's own classifier.

        Raises:
            ValueError: it has none, or was trained on other classes.
        """
        model = self.model
        if not model.method.validates:
            raise ValueError(f"{self.source} has no classifier: measure its features by scaler eval knn or linear")
        model.method.check_classes(self.val.index.class_names)
        to_label = None
        try:
            trained_on = open_images(model.trained_on or "")
        except ValueError as error:
            if self.world.rank == 0:
                text = "whose class names say what each label means; they are taken in the order of those here"
                warnings.warn(f"cannot read the shards that the run was trained on, {text} ({error})", stacklevel=2)
        else:
            to_label = common_labels(trained_on, self.val.index)
        scores, rejected = mean_scores(
            model.classified,
            self.val.index,
            world=self.world,
            device=model.device,
            normalization=model.method.normalization,
            to_label=to_label,
            view=View("center", model.image_size, kind="center", crop_fraction=self.crop_fraction),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            ranks_per_node=self.ranks_per_node,
        )
        return self._record("classifier", **scores, rejected=rejected)

    def _parts(self, *, layers: bool) -> tuple[Part, Part, int, dict[str, Any]]:
        """This rank's features of training and test images in the labels of the former, the number of classes, and how
        fast features were extracted."""
        assert self.train is not None
        to_train = common_labels(self.train.index, self.val.index)
        parts, rates = [], []
        for images in (self.train, self.val):
            found = self.model.extract(
                images.index,
                layers=layers,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                crop_fraction=self.crop_fraction,
                kept=self.kept,
                world=self.world,
                ranks_per_node=self.ranks_per_node,
                name=images.place,
            )
            parts.append(found.part)
            fresh = f"{found.images} of {found.num_samples} images"
            if found.images_per_second is None:
                self.say(f"features of {images.place}: all {found.num_samples} kept from an earlier evaluation")
            else:
                rates.append((found.images, found.images_per_second))
                self.say(f"features of {images.place}: {fresh}, {found.images_per_second:,.0f} images/s")
        val = parts[1]._replace(labels=to_train[parts[1].labels])
        seconds = sum(images / rate for images, rate in rates)
        speed = sum(images for images, _ in rates) / seconds if rates else None
        return parts[0], val, len(self.train.index.class_names), {"images_per_second": speed}

    def _record(self, kind: str, **facts: Any) -> dict[str, Any]:
        model = self.model
        places = {"train": self.train, "val": self.val}
        return {
            "evaluation": kind,
            "checkpoint": self.source,
            "step": model.step,
            "weights": model.line,
            "weights_sha256": model.sha256,
            "image_size": model.image_size,
            "crop_fraction": self.crop_fraction,
            "precision": model.precision,
            **{
                f"{name}{what}": value
                for name, images in places.items()
                if images is not None
                for what, value in (
                    ("", images.place),
                    ("_fingerprint", images.index.fingerprint),
                    ("_samples", images.index.num_samples),
                )
            },
            **facts,
            "device": model.device.type,
            "processes": self.world.size,
            "versions": {name: metadata.version(name) for name in ("scaler", "torch", "timm")},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def keep_record(record: dict[str, Any], *, source: str, out: str | Path | None = None) -> Path | None:
    """Write a record, whole or not at all: to `out`, or beside the others of the run that `source` is or belongs to.

    Returns:
        Where it is; None: the source belongs to no run here.
    """
    text = json.dumps(record, indent=1) + "\n"
    if out is None:
        run = _run_of(source)
        if run is None:
            return None
        stamp = record["date"].replace("-", "").replace(":", "").partition("+")[0]
        step = "" if record["step"] is None else f"-step-{record['step']:08d}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]  # two evaluations may end in one second
        out = run / "evaluations" / f"{record['evaluation']}{step}-{stamp}-{digest}.json"
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    return path


def _run_of(source: str) -> Path | None:
    """The run directory that a source is, or that a checkpoint belongs to."""
    place = Path(source)
    for folder in (place, *([place.parent.parent] if (place / "manifest.json").is_file() else [])):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None
