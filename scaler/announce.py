"""What a run says before its first step: what is engaged, and what the user should know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scaler.checkpoint import Location
from scaler.data import TrainingData
from scaler.layout import Layout
from scaler.loop import Progress
from scaler.methods.base import Method
from scaler.metrics import MetricsLog
from scaler.recipe import Recipe
from scaler.timetable import Timetable


def announce(
    log: MetricsLog,
    report: dict[str, Any],
    *,
    recipe: Recipe,
    method: Method,
    data: TrainingData,
    timetable: Timetable,
    layouts: Mapping[int, Layout],
    started: int,
    begun: list[str],
    source: Location | None,
    progress: Progress,
) -> None:
    """Print what was really engaged, and what the user should know of it."""
    log.note("engaged: " + ", ".join(f"{key} {value}" for key, value in report.items()))
    size, images, epochs = recipe.data.global_batch_size, "a stream of images", ""
    if data.num_samples is not None:
        images = f"{data.num_samples} images"
        epochs = f" ({timetable.images(timetable.total) / data.num_samples:.2f} epochs)"
    layout = layouts[size]
    log.note(
        f"{recipe.method.name}: {images}, global batch {size} = "
        f"{layout.ranks} ranks × {layout.num_micro_batches} micro-batches × {layout.micro_batch_size}, "
        f"{timetable.total} steps{epochs}, in {recipe.run.dir}"
    )
    if stages := timetable.describe():
        log.note(stages)
    if started > layout.ranks:
        idle = started - layout.ranks
        log.note(f"{layout.ranks} of {started} ranks train, {idle} idle: the batch can be laid over no more of them")
    for line in data.notes(layout=layout, resumes=source is not None):
        log.note(line)
    for line in unread_settings(recipe, method):
        log.note(f"warning: {line}")
    for line in method.advice(
        num_samples=data.num_samples, global_batch_size=size, steps=timetable.steps, optim=recipe.optim
    ):
        log.note(line)
    for line in begun:
        log.note(line)
    if source is not None:
        log.note(f"resuming from {source}: step {progress.step}, {progress.images} images seen")


def unread_settings(recipe: Recipe, method: Method) -> Iterator[str]:
    """What the recipe says about evaluation that nothing reads."""
    default = type(recipe.evaluate)()
    if recipe.data.val_shards is None:
        if recipe.evaluate != default:
            yield "the section evaluate is set, without effect: data.val_shards names no images to score"
        written = recipe.checkpoint.model_fields_set
        if "keep_best" in written and len(written) < len(type(recipe.checkpoint).model_fields):  # by hand, not by a run
            yield "checkpoint.keep_best is set, without effect: data.val_shards names no images to tell the best by"
    elif method.validates:
        for key in ("neighbours", "k"):
            if getattr(recipe.evaluate, key) != getattr(default, key):
                yield f"evaluate.{key} is set, without effect: {recipe.method.name} is scored by its own classifier"
