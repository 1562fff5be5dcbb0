"""What a model has learned: kNN, linear classifiers, or its own classifier."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaler.cli.common import Json, WrongUse, group, print_table

if TYPE_CHECKING:
    from scaler.evals.evaluate import Evaluation

evals = group("Measure what a model has learned.")

Source = Annotated[
    str,
    typer.Argument(
        help="A run (its newest checkpoint) or one checkpoint, path or URL; timm:NAME; or weights, a file "
        "(.safetensors, .pth, …) or a folder of timm's."
    ),
]
Train = Annotated[
    str, typer.Option("--train", help="Labelled images to learn from: shards (path or URL), or class folders.")
]
Val = Annotated[str, typer.Option("--val", help="Labelled images to classify: shards (path or URL), or class folders.")]
Backbone = Annotated[str | None, typer.Option(help="Of a file of weights: timm's name of the model.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the recipe's, or timm's")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="Random weights: the model before any training.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Loader processes of each process.")]
CropFraction = Annotated[float, typer.Option(help="Side of the centre crop, of the resized image.")]
Precision = Annotated[str, typer.Option(help="Of the model: fp32 or bf16.")]
Device = Annotated[str | None, typer.Option(help="As cpu or cuda:1.", show_default="the first GPU, or cpu")]
Processes = Annotated[int, typer.Option(min=1, help="On this machine, one per GPU; torchrun may start them too.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where features are kept, and folders of images as shards, at most 50 GB.",
        show_default="in the user's cache folder",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no features, and use none that were kept.")]
ShardCacheDir = Annotated[
    Path | None, typer.Option(help="Where shards of a URL are kept.", show_default="in the user's cache folder")
]
Out = Annotated[
    Path | None, typer.Option(help="File for the result.", show_default="RUN/evaluations/… of a run's checkpoint")
]


@evals.command(epilog="Example: scaler eval knn runs/first --train shards/train --val shards/val --k 10,20,100")
def knn(
    source: Source,
    train: Train,
    val: Val,
    k: Annotated[str, typer.Option(help="Neighbours that vote; several as 10,20,100.")] = "20",
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.07,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    random_init: RandomInit = False,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 0,
    crop_fraction: CropFraction = 0.875,
    precision: Precision = "fp32",
    device: Device = None,
    processes: Processes = 1,
    cache_dir: CacheDir = None,
    no_cache: NoCache = False,
    shard_cache_dir: ShardCacheDir = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a weighted k-nearest-neighbour vote on the frozen features (of the teacher, where there is one)."""
    try:
        ks = [int(part) for part in k.split(",")]
    except ValueError:
        raise WrongUse(f"--k is {k!r}; give a number, or several as 10,20,100") from None
    with _evaluation(**_options(locals())) as (evaluation, finish):
        finish(evaluation.knn(ks=ks, temperature=temperature), _knn_table)


@evals.command(epilog="Example: scaler eval linear runs/first --train shards/train --val shards/val --processes 8")
def linear(
    source: Source,
    train: Train,
    val: Val,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the training images' features.")] = 10.0,
    min_steps: Annotated[int, typer.Option(min=1, help="Steps at least, for small sets.")] = 3000,
    held_out: Annotated[float, typer.Option(help="Part of the training images by which the best is chosen.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of images, and of those held out.")] = 0,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    random_init: RandomInit = False,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 0,
    crop_fraction: CropFraction = 0.875,
    precision: Precision = "fp32",
    device: Device = None,
    processes: Processes = 1,
    cache_dir: CacheDir = None,
    no_cache: NoCache = False,
    shard_cache_dir: ShardCacheDir = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a linear classifier on the frozen features, the best of a grid.

    As DINOv2 measures: learning rates × the class token of the last block or of the last four × with or without the
    mean of the patches, all trained at once on features of centre crops. A part of the training images chooses; the
    chosen one is trained again on all of them and scored on --val.
    """
    with _evaluation(**_options(locals())) as (evaluation, finish):
        finish(evaluation.linear(epochs=epochs, min_steps=min_steps, held_out=held_out, seed=seed), _linear_table)


@evals.command(epilog="Example: scaler eval classifier runs/first --val shards/val")
def classifier(
    source: Source,
    val: Val,
    image_size: ImageSize = None,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 0,
    crop_fraction: CropFraction = 0.875,
    precision: Precision = "fp32",
    device: Device = None,
    processes: Processes = 1,
    cache_dir: CacheDir = None,
    shard_cache_dir: ShardCacheDir = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Accuracy and loss of a supervised run's own classifier."""
    with _evaluation(**_options(locals())) as (evaluation, finish):
        finish(evaluation.classifier(), None)


# ---------------------------------------------------------------------- what they share

Table = Callable[[dict[str, Any]], None]
_LET_RANK_0_SPEAK = 15.0  # seconds: most errors strike all ranks


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a command that all commands have."""
    own = ("k", "ks", "temperature", "epochs", "min_steps", "held_out", "seed")
    return {name: value for name, value in values.items() if name not in own}


@contextlib.contextmanager
def _evaluation(
    source: str,
    *,
    val: str,
    image_size: int | None,
    batch_size: int,
    num_workers: int,
    crop_fraction: float,
    precision: str,
    device: str | None,
    processes: int,
    cache_dir: Path | None,
    shard_cache_dir: Path | None,
    out: Path | None,
    as_json: bool,
    train: str | None = None,
    backbone: str | None = None,
    random_init: bool = False,
    no_cache: bool = False,
) -> Iterator[tuple[Evaluation, Callable[[dict[str, Any], Table | None], None]]]:
    """What is to be evaluated, on the ranks that there are, and a function that shows and keeps the record.

    Several processes on this machine are started here; each of them then comes here by itself.
    """
    if precision not in ("fp32", "bf16"):
        raise WrongUse(f"--precision is {precision!r}; it is fp32 or bf16")
    if not 0 < crop_fraction <= 1:
        raise WrongUse(f"--crop-fraction is {crop_fraction}; it lies above 0 and is at most 1")
    from scaler.evals.images import open_images
    from shards.cache import ShardCache

    shards = partial(open_images, cache_dir=cache_dir, shard_cache=ShardCache(shard_cache_dir))
    places = [place for place in (val, train) if place is not None]
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        for place in places:  # what is wrong is said once here, and folders of images are made into shards once
            shards(place)
        raise typer.Exit(_start(processes))

    import torch.distributed as dist

    from scaler.collectives import World
    from scaler.evals.checkpoints import load_for_evaluation
    from scaler.evals.evaluate import Evaluation, Images, keep_record
    from scaler.evals.store import Kept
    from scaler.strategies.processes import join, meet, ranks_per_node
    from shards.places import without_secrets

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        world, own = World(), None
        if size > 1:
            world, own = join(meet(), ranks=size)
        # One process of a machine makes a folder of images into shards, the others find them made.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        images = [shards(place) for place in places] if first else []
        world.barrier()
        opened = [
            Images(without_secrets(place), index)
            for place, index in zip(places, images or map(shards, places), strict=True)
        ]

        def finish(record: dict[str, Any], table: Table | None) -> None:
            if world.rank:
                return
            path = keep_record(record, source=source, out=out)
            if as_json:
                print(json.dumps(record))
                return
            _show(record, table)
            if path is not None:
                print(f"kept in {path}")

        yield (
            Evaluation(
                load_for_evaluation(
                    source,
                    device=device or own,
                    random_init=random_init,
                    backbone=backbone,
                    image_size=image_size,
                    precision=precision,
                ),
                source=without_secrets(source),
                val=opened[0],
                train=opened[1] if train is not None else None,
                world=world,
                kept=None if no_cache else Kept(cache_dir),
                batch_size=batch_size,
                num_workers=num_workers,
                crop_fraction=crop_fraction,
                ranks_per_node=ranks_per_node(size),
                say=(lambda line: print(line, file=sys.stderr)) if rank == 0 else (lambda line: None),
            ),
            finish,
        )
    except (ValueError, OSError):
        if rank:
            time.sleep(_LET_RANK_0_SPEAK)  # whose end ends this process too
        raise
    if size > 1:
        dist.destroy_process_group()


def _start(processes: int) -> int:
    """Run this very command on so many processes of this machine; returns its exit code."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launch.local import environment

    # The processes say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.update(environment(processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "scaler.cli", *sys.argv[1:])
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    return 0


def _show(record: dict[str, Any], table: Table | None) -> None:
    hidden = ("evaluation", "table", "versions", "weights_sha256", "train_fingerprint", "val_fingerprint", "date")
    facts = {name: fact for name, fact in record.items() if fact not in (None, "") and name not in hidden}
    for name in ("top1", "top5", "held_out_top1"):
        if name in facts:
            facts[name] = f"{100 * facts[name]:.1f} %"
    for name in ("loss", "images_per_second"):
        if name in facts:
            facts[name] = f"{facts[name]:.4g}"
    print_table(facts)
    if table is not None and len(record["table"]) > 1:
        table(record)


def _knn_table(record: dict[str, Any]) -> None:
    """A row for each k."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("k", "top1", "top5", title="neighbours")
    for row in record["table"]:
        shown.add_row(str(row["k"]), *(f"{100 * row[name]:.1f} %" for name in ("top1", "top5")))
    Console().print(shown)


def _linear_table(record: dict[str, Any]) -> None:
    """Held-out accuracy, a row for each learning rate and a column for each input."""
    from rich.console import Console
    from rich.table import Table

    cells = {(row["lr"], row["input"]): f"{100 * row['top1']:.1f}" for row in record["table"]}
    cells[record["lr"], record["input"]] += " ←"
    inputs = list(dict.fromkeys(name for _, name in sorted(cells)))
    shown = Table("learning rate", *inputs, title="top-1 % on the held-out training images")
    for lr in sorted({lr for lr, _ in cells}):
        shown.add_row(f"{lr:g}", *(cells[lr, name] for name in inputs))
    Console().print(shown)
