"""What things cost on this machine."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from scaler.cli.common import Json, group, print_table

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
    from launch.local import run

    if processes > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        raise typer.Exit(run([*launcher, "-m", "scaler.cli", *sys.argv[1:]], processes=processes))
    from scaler.bench.checkpoint import as_rows, measure

    result = measure(
        recipe,
        overrides=overrides or [],
        batch=batch,
        minutes=minutes,
        pairs=pairs,
        place=to,
        say=lambda text: print(text, file=sys.stderr, flush=True) if os.environ.get("RANK", "0") == "0" else None,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result))
        return
    print_table(as_rows(result))
