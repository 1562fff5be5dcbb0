"""What things cost on this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from scaler.cli.common import Json, Overrides, RecipeName, WrongUse, group, print_table

benchmarks = group("Measure what things cost on this machine.")


@benchmarks.command("checkpoint", epilog="Example: scaler bench checkpoint simclr/vits16_in1k --processes 2")
def bench_checkpoint(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name.")] = "simclr/vits16_in1k",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as data.image_size=112.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per process and step, instead of the recipe's.")] = 8,
    minutes: Annotated[float, typer.Option(min=0.01, help="From one checkpoint to the next.")] = 1.0,
    pairs: Annotated[int, typer.Option(min=1, help="Stretches of so many minutes with, and as many without.")] = 4,
    to: Annotated[
        str | None, typer.Option(help="Path or URL for the checkpoints.", show_default="a temporary folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """What saving in the background costs the training, against none, interleaved in one run on random images.

    Processes that torchrun or accelerate have started (`-m scaler.cli bench checkpoint …`) measure together.
    """
    _start(processes)
    from scaler.bench.checkpoint import as_rows, measure

    result = measure(
        recipe,
        overrides=overrides or [],
        batch=batch,
        minutes=minutes,
        pairs=pairs,
        place=to,
        say=_say,
    )
    if not _is_first():
        return
    if as_json:
        print(json.dumps(result))
        return
    print_table(as_rows(result))


@benchmarks.command("step", epilog="Example: scaler bench step dinov2/vits16_in1k --images 8 method.group_size=8")
def bench_step(
    recipe: RecipeName = "dinov2/demo",
    overrides: Overrides = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Of a process in a step.", show_default="the recipe's micro-batch"),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    data: Annotated[str, typer.Option(help="synthetic, or real: from the recipe's shards.")] = "synthetic",
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2…", help="Recipe values; several: every combination.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="With the step as others write it: DINOv2 and SimCLR as one does first (timm's blocks, all scores in "
            "memory or lightly's loss, AdamW parameter by parameter), supervised training as timm's script; DINOv2 "
            "also with one pass per crop size.",
        ),
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="File for the profiler's trace of a step (.json or .json.gz).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each contender in a round.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each contender's turn.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each in a round, instead of seconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON, with hardware and versions.")] = None,
    as_json: Json = False,
) -> None:
    """Time of a training step, by part, its share of this machine's own rate in matrix products, and its memory.

    Processes that torchrun or accelerate have started (`-m scaler.cli bench step …`) measure together.
    """
    _start(processes)
    from scaler.bench.step import measure
    from scaler.bench.step_text import as_lines, as_table

    result = measure(
        recipe,
        overrides=overrides or [],
        images=images,
        data=data,
        vary=vary or [],
        compare=compare,
        trace_to=trace,
        seconds=seconds,
        rounds=rounds,
        steps=steps,
        say=_say,
    )
    if not _is_first():
        return
    _write(result, out)
    _show(result, as_json, as_table, as_lines)


@benchmarks.command("loader", epilog="Example: scaler bench loader shards/train --views dinov2")
def bench_loader(
    source: Annotated[
        str | None, typer.Argument(help="A folder of images, or shards (folder or URL).", show_default="a made set")
    ] = None,
    views: Annotated[str, typer.Option(help="simclr, dinov2, or a recipe.")] = "simclr",
    parts: Annotated[str, typer.Option(help="Of everything, worker, colours, decode, raw.", show_default="all")] = "",
    peers: Annotated[
        str, typer.Option(help="none, or of webdataset, litdata, mosaicml-streaming, dali.", show_default="all")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each loader in a round.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each loader's turn.")] = 5,
    images: Annotated[int, typer.Option(min=1, help="So many of the source's, or so many are made.")] = 3000,
    appetite: Annotated[
        float, typer.Option(min=1, help="Images per second of one GPU; 250: an H200 with DINOv2's ViT-L.")
    ] = 250.0,
    as_json: Json = False,
) -> None:
    """Images per second through our loader and through others, interleaved on one core.

    Rates are per second of processor time of the whole process, so that they can be multiplied by the cores.
    """
    from scaler.bench.loader import PARTS, as_lines, as_table, measure
    from scaler.bench.peers import PEERS

    result = measure(
        source,
        views=views,
        parts=_listed(parts, PARTS),
        peers=_listed(peers, tuple(PEERS)),
        seconds=seconds,
        rounds=rounds,
        images=images,
        appetite=appetite,
        say=_say,
    )
    _show(result, as_json, as_table, as_lines)


@benchmarks.command("convert", epilog="Example: scaler bench convert photos/train")
def bench_convert(
    source: Annotated[str | None, typer.Argument(help="A folder of images.", show_default="two made sets")] = None,
    small: Annotated[int, typer.Option(min=0, help="Files of 6.7 KB that are made; 0: none.")] = 20_000,
    large: Annotated[int, typer.Option(min=0, help="Files of 110 KB that are made; 0: none.")] = 3_000,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of the rows with several.", show_default="as many as cores")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each one's turn.")] = 3,
    peers: Annotated[
        str, typer.Option(help="none, or of webdataset, mosaicml-streaming, litdata.", show_default="all")
    ] = "",
    as_json: Json = False,
) -> None:
    """Files per second from a folder into shards, ours and others', interleaved on files in the page cache."""
    from scaler.bench.convert import PEERS, as_lines, as_table, measure

    result = measure(
        source,
        small=small,
        large=large,
        processes=processes,
        rounds=rounds,
        peers=_listed(peers, PEERS),
        say=_say,
    )
    _show(result, as_json, as_table, as_lines)


@benchmarks.command("loop", epilog="Example: scaler bench loop dinov2/demo track.log_every='10 steps'")
def bench_loop(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as data.image_size=112.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loop.")] = 10,
    trackers: Annotated[
        str, typer.Option(help="Whose rows are timed: none, or of tensorboard, wandb.")
    ] = "tensorboard",
    as_json: Json = False,
) -> None:
    """What our training loop costs against a bare one, interleaved on one process on noise; and logging and pauses."""
    from scaler.bench.loop import as_lines, as_table, measure

    result = measure(
        recipe,
        overrides=overrides or [],
        steps=steps,
        rounds=rounds,
        trackers=_listed(trackers, ()),
        say=_say,
    )
    _show(result, as_json, as_table, as_lines)


@benchmarks.command("loss", epilog="Example: scaler bench loss --method simclr --size 8192")
def bench_loss(
    method: Annotated[str, typer.Option(help="simclr, dinov2 or sinkhorn (dinov2's targets).")] = "simclr",
    size: Annotated[int | None, typer.Option(min=2, help="Images.", show_default="2,048 or 16")] = None,
    prototypes: Annotated[int, typer.Option(min=2, help="Of dinov2.")] = 65_536,
    width: Annotated[int, typer.Option(min=1, help="Channels of simclr's embeddings.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of simclr.")] = 0.1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="Ours of dinov2 also compiled.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each contender in a round.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each one's turn.")] = 3,
    as_json: Json = False,
) -> None:
    """Time, peak memory and gradients of our losses, lightly's and plain torch's, on the GPU if there is one."""
    from scaler.bench.loss import as_lines, as_table, measure

    _show(
        measure(
            method,
            size=size,
            prototypes=prototypes,
            width=width,
            temperature=temperature,
            precision=precision,
            compiled=compiled,
            seconds=seconds,
            rounds=rounds,
            say=_say,
        ),
        as_json,
        as_table,
        as_lines,
    )


@benchmarks.command("feed", epilog="Example: scaler bench feed dinov2/vits16_in1k --images 128 --cores 8")
def bench_feed(
    recipe: RecipeName = "dinov2/demo",
    overrides: Overrides = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Of a step.", show_default="the recipe's micro-batch")
    ] = None,
    made: Annotated[
        int, typer.Option(min=1, help="Pictures that are made, or at most taken of data.shards=… if given.")
    ] = 2000,
    cores: Annotated[
        int | None, typer.Option(min=1, help="For this process and its workers.", show_default="all")
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Numbers of them, as 1,2,4.", show_default="powers of two up to the cores")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each in a round.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each one's turn.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="File for the result as JSON; scaler doctor --feed reads it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether loading keeps up with the step on so many cores, with and without GPU decoding, beside stock loading."""
    from scaler.bench.fed import as_lines, as_table
    from scaler.bench.feed import measure

    try:
        numbers = [int(word) for word in _listed(workers, ())]
    except ValueError:
        raise WrongUse(f"--workers {workers!r} is no list of numbers, as 1,2,4") from None
    result = measure(
        recipe,
        overrides=overrides or [],
        images=images,
        made=made,
        cores=cores,
        workers=numbers,
        seconds=seconds,
        rounds=rounds,
        say=_say,
    )
    _write(result, out)
    _show(result, as_json, as_table, as_lines)


@benchmarks.command("augment", epilog="Example: scaler bench augment dinov2/vits16_in1k --step")
def bench_augment(
    recipe: RecipeName = "dinov2/demo",
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=1, help="Of a batch.")] = 64,
    peers: Annotated[str, typer.Option(help="none, or of kornia, torchvision.", show_default="all")] = "",
    step: Annotated[bool, typer.Option("--step", help="Also the recipe's step: which part of it this is.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each in a round.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that it is each one's turn.")] = 5,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON, with hardware and versions.")] = None,
    as_json: Json = False,
) -> None:
    """The device half of the augmentation: ours, kornia's and torchvision's with the same operations, in turn.

    On a CPU with one thread.
    """
    from scaler.bench.augment import PEERS, as_lines, as_table, measure

    result = measure(
        recipe,
        overrides=overrides or [],
        images=images,
        peers=_listed(peers, PEERS),
        step=step,
        seconds=seconds,
        rounds=rounds,
        say=_say,
    )
    _write(result, out)
    _show(result, as_json, as_table, as_lines)


def _listed(text: str, all_: Sequence[str]) -> Sequence[str]:
    """An option's list: nothing given is all."""
    if text == "none":
        return []
    return text.split(",") if text else all_


def _start(processes: int) -> None:
    """Run this very command in several processes instead, unless a launcher has done so already."""
    from launch.local import run

    if processes > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        raise typer.Exit(run([*launcher, "-m", "scaler.cli", *sys.argv[1:]], processes=processes))


def _is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_first():
        print(text, file=sys.stderr, flush=True)


def _write(result: dict[str, Any], out: Path | None) -> None:
    """The result as a JSON file, where one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def _show(
    result: dict[str, Any],
    as_json: bool,
    as_table: Callable[[dict[str, Any]], RenderableType],
    as_lines: Callable[[dict[str, Any]], Iterator[str]],
) -> None:
    """One JSON object, or a table and what it means in words."""
    if as_json:
        print(json.dumps(result))
        return
    Console().print(as_table(result))
    for line in as_lines(result):
        print(line)
