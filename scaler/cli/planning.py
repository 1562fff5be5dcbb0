"""What a recipe will take on a machine, before anything is started there."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from scaler.cli.common import Json, Overrides, WrongUse, print_table

planning = typer.Typer()


@planning.command(epilog="Example: scaler plan dinov2/vitl16_in1k --gpus 8 --nodes 4 --memory 80GB --images 1281167")
def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name such as dinov2/demo.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Of each node.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    memory: Annotated[str, typer.Option(help="Of a GPU.")] = "80GB",
    images: Annotated[
        int | None, typer.Option(min=1, help="Of an epoch.", show_default="those of data.shards, or ImageNet-1k's")
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Of one GPU, as measured.", show_default="from --tflops and --mfu")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of a GPU at its best, in TFLOP/s.", show_default="an H100's")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of these that training reaches.")] = 0.35,
    intra: Annotated[str, typer.Option(help="A second, from a GPU to others of its machine.")] = "450GB/s",
    inter: Annotated[str, typer.Option(help="A second, from a GPU to other machines.")] = "50GB/s",
    loader: Annotated[
        float | None, typer.Option(min=1, help="Images a second of a loader worker (scaler bench loader).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few steps here, and compare them with the plan.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --measure: on this machine, one per GPU.")] = 1,
    as_json: Json = False,
) -> None:
    """Memory by part, micro-batch, network, loader and days under every strategy, and what to start. No GPU is needed.

    The method's own code runs on tensors without memory, so this takes seconds (a minute for the largest models) and
    next to no memory.
    """
    from launch import make_job
    from launch import plan as launch
    from launch.local import run
    from scaler.recipe import load_recipe

    words = overrides or []
    try:
        checked = load_recipe(recipe, overrides=words)
        size, near, far = [_size(text) for text in (memory, intra, inter)]
    except ValueError as error:
        raise WrongUse(str(error)) from None
    if measure and processes > 1 and "WORLD_SIZE" not in os.environ:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        raise typer.Exit(run([*start, "-m", "scaler.cli", *sys.argv[1:]], processes=processes))
    if measure:
        from scaler.plan.measure import compare_here
        from scaler.plan.report import measured_as_rows

        found = compare_here(checked)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found)) if as_json else print_table(measured_as_rows(found))
        return

    from scaler.plan.planner import Choice, Machine, plan_recipe
    from scaler.plan.report import plan_as_json, show_plan

    machine = Machine(
        gpus,
        nodes,
        memory=size,
        intra=near,
        inter=far,
        tflops=tflops,
        mfu=mfu,
        images_per_second=images_per_second,
        loader=loader,
    )
    planned = plan_recipe(checked, machine, images=images or _images(checked), say=_say)

    def command(choice: Choice) -> str:
        values = [*words, *choice.overrides(checked)]
        if nodes > 1:  # whose names nobody knows here
            shape = ["--nodes", str(nodes), "--processes", str(gpus), "--hosts", "hosts", "--run"]
            return shlex.join(["scaler", "launch", "torchrun", recipe, *values, *shape]) + "\n"
        settings = load_recipe(recipe, overrides=values).strategy
        return launch("torchrun", make_job(recipe, values, settings=settings, nodes=nodes, processes=gpus)).text

    if as_json:
        print(json.dumps(plan_as_json(planned, machine, start=command)))
    else:
        show_plan(planned, machine, start=command)
    if planned.best is None:
        raise typer.Exit(1)


def _size(text: str) -> int:
    """Bytes of `80GB`, or of `50GB/s` in a second."""
    from shards.storage import parse_size

    return parse_size(text.removesuffix("/s"))


def _images(recipe: Any) -> int | None:
    """Images of the recipe's shards, if these can be seen from here."""
    from shards.index import ShardIndex

    place = recipe.data.shards
    if recipe.data.reader != "indexed" or not ("://" in place or (Path(place) / "index.json").is_file()):
        return None
    return ShardIndex.load(place).num_samples


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
