"""Trainings: here, or started on many machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scaler.cli.common import Json, Overrides, RecipeName, WrongUse

training = typer.Typer()


@training.command(epilog="Example: scaler train dinov2/demo data.shards=shards/train run.dir=runs/first --processes 2")
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
) -> None:
    """Train, or go on training where the run directory's newest checkpoint stands.

    Several processes are started through Accelerate's launcher, with the configuration for the recipe's strategy.
    """
    from launch.local import run, train_command
    from scaler.recipe import load_recipe
    from shards.index import ShardIndex

    try:
        checked = load_recipe(recipe, overrides=overrides or [])
    except ValueError as error:
        raise WrongUse(str(error)) from None
    # What is wrong with the data is said once here, instead of by every process.
    if checked.data.reader == "indexed":
        ShardIndex.load(checked.data.shards)
    else:
        from scaler.data import open_data  # brings torch, which takes seconds

        open_data(checked)
    command = train_command(recipe, overrides or [], processes=processes, strategy=checked.strategy.name)
    raise typer.Exit(run(command, processes=processes))


@training.command(
    epilog="Example: scaler launch torchrun dinov2/vitl16_in1k --hosts hostfile --run strategy.name=fsdp2"
)
def launch(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="accelerate, deepspeed, torchrun, slurm or kubernetes.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    hosts: Annotated[Path | None, typer.Option(help="Hostfile: a line `NAME slots=N` for each machine.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines.", show_default="all of the hostfile, else 1")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="On each, one per GPU.", show_default="the hostfile's slots, else 1")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where they meet on the first machine.")] = 29500,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Times to start again when a process died.", show_default="3")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For every process; repeatable.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit, as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: where to run.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: who pays.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Slurm: another option of sbatch; repeatable.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: a container image with scaler in it.")] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(metavar="CLAIM:/PATH", help="Kubernetes: a volume claim, and where to mount it; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Kubernetes: of the JobSet.", show_default="the run directory's")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes: where to run.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Slurm, Kubernetes: on each machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="Slurm, Kubernetes: on each machine, in their words.")] = None,
    gpus: Annotated[
        bool | None,
        typer.Option("--gpus/--no-gpus", help="Slurm, Kubernetes: one for each process.", show_default="gpus"),
    ] = None,
    grace: Annotated[
        int | None,
        typer.Option(min=1, help="Slurm, Kubernetes: seconds to save in before the end.", show_default="120 and 300"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at the hosts instead: one line a problem.")] = False,
    execute: Annotated[bool, typer.Option("--run", help="Look at the hosts, then run it.")] = False,
    as_json: Json = False,
) -> None:
    """Print exactly what starts a training with a launcher or scheduler, or run it.

    The command is printed for each host where they differ, with the host's name; for a scheduler it is a file.
    """
    from launch import KINDS, make_job, plan, run
    from launch.check import check_hosts
    from scaler.recipe import load_recipe, nearest

    if kind not in KINDS:
        raise WrongUse(f"no kind of launch {kind!r}; {nearest(kind, list(KINDS))}")
    if as_json and execute:
        raise WrongUse("--json prints what would be run; leave out --run")
    if kind == "deepspeed" and max_restarts is not None:
        raise WrongUse(
            "deepspeed starts no dead process again; use torchrun or accelerate, or leave out --max-restarts"
        )
    if kind in ("slurm", "kubernetes") and hosts is not None:
        raise WrongUse(f"{kind} chooses the machines itself; give --nodes instead of --hosts")
    asked = {
        "time": time,
        "partition": partition,
        "account": account,
        "sbatch": sbatch,
        "image": image,
        "claim": claim,
        "name": name,
        "namespace": namespace,
        "cpus": cpus,
        "memory": memory,
        "gpus": gpus,
        "grace": grace,
    }
    try:
        checked = load_recipe(recipe, overrides=overrides or [])
        job = make_job(
            recipe,
            overrides or [],
            settings=checked.strategy,
            hostfile=hosts,
            nodes=nodes,
            processes=processes,
            port=port,
            max_restarts=max_restarts,
            environment=env or [],
        )
        planned = plan(kind, job, **{option: value for option, value in asked.items() if value is not None})
    except ValueError as error:
        raise WrongUse(str(error)) from None
    report = check_hosts(job, checked, kind=kind) if check or execute else None
    if report is not None and not as_json:
        report.show()
    if as_json:
        print(json.dumps({**vars(planned), "problems": report and report.problems}))
    elif not check:
        print(planned.text, end="", flush=True)
    if report is not None and report.problems:
        raise typer.Exit(1)
    if execute:
        raise typer.Exit(run(planned, job))


@training.command(epilog="Example: scaler demo --dir demo")
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """Real images → shards → SimCLR and DINOv2 on two processes, one killed and resumed → kNN and a picture."""
    from scaler.demo import run_demo

    run_demo(folder)
