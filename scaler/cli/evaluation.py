"""What a model has learned."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from scaler.cli.common import Json, group, print_table

evals = group("Measure what a model has learned.")


@evals.command(epilog="Example: scaler eval knn runs/first --train shards/train --val shards/val")
def knn(
    source: Annotated[
        str,
        typer.Argument(
            help="A run (its newest checkpoint) or one checkpoint, path or URL; timm:NAME; or weights, a file "
            "(.safetensors, .pth, …) or a folder of timm's."
        ),
    ],
    train_shards: Annotated[str, typer.Option("--train", help="Labelled shards (path or URL): the neighbours.")],
    val_shards: Annotated[str, typer.Option("--val", help="Labelled shards (path or URL) to classify.")],
    backbone: Annotated[str | None, typer.Option(help="Of a file of weights: timm's name of the model.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels.", show_default="the recipe's, or timm's for the model")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.07,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Random weights: the model before any training.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    crop_fraction: Annotated[float, typer.Option(help="Side of the centre crop, of the resized image.")] = 0.875,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1.", show_default="the first GPU, or cpu")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a weighted k-nearest-neighbour vote on the frozen features (of the teacher, where there is one)."""
    from scaler.evals.checkpoints import load_for_evaluation
    from shards.index import ShardIndex

    train_index, val_index = ShardIndex.load(train_shards), ShardIndex.load(val_shards)
    model = load_for_evaluation(
        source, device=device, random_init=random_init, backbone=backbone, image_size=image_size
    )
    scores = model.knn(
        train_index,
        val_index,
        k=k,
        temperature=temperature,
        batch_size=batch_size,
        num_workers=num_workers,
        crop_fraction=crop_fraction,
    )
    facts = {
        "checkpoint": source,
        "step": model.step,
        "weights": model.line,
        "image_size": model.image_size,
        "k": k,
        "temperature": temperature,
        "train_samples": train_index.num_samples,
        "val_samples": val_index.num_samples,
    }
    if as_json:
        print(json.dumps({**facts, **scores}))
        return
    facts = {name: fact for name, fact in facts.items() if fact not in (None, "")}
    print_table({**facts, **{name: f"{100 * score:.1f} %" for name, score in scores.items()}})
