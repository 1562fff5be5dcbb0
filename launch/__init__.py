"""Starts trainings: on this machine, on several over ssh, or through a scheduler.

job = make_job("dinov2/demo", ["run.dir=runs/first"], settings=recipe.strategy, hostfile=Path("hostfile"))
launch = plan("torchrun", job)
print(launch.text)
exit_code = run(launch, job)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from launch.hosts import choose_hosts, read_hosts
from launch.job import Job, Launch

# Kind of launch → the module whose `plan(job) -> Launch` says how.
KINDS = {
    "accelerate": "launch.accelerate",
    "deepspeed": "launch.deepspeed",
    "torchrun": "launch.torchrun",
    "slurm": "launch.slurm",
    "kubernetes": "launch.kubernetes",
}

# Variables of this shell that hosts reached by ssh get too: hosts that differ in them wait for each other forever.
_CARRIED = ("GLOO_", "NCCL_", "OMP_NUM_THREADS", "PYTHONPATH")


def make_job(
    recipe: str,
    overrides: Sequence[str],
    *,
    settings: Any,
    hostfile: Path | None = None,
    nodes: int | None = None,
    processes: int | None = None,
    environment: Sequence[str] = (),
    **options: Any,
) -> Job:
    """A job from what a command line says.

    Args:
        recipe: path or short name.
        overrides: `key=value` words.
        settings: the recipe's strategy section.
        hostfile: the machines; None: this one, or `nodes` that have no names yet.
        nodes: machines; None: all of the hostfile, else 1.
        processes: on each machine; None: its slots in the hostfile, else 1.
        environment: `NAME=VALUE` words.
        options: other fields of Job; None leaves the default.

    Raises:
        ValueError: the hostfile, the numbers or the variables cannot be right.
    """
    hosts = choose_hosts(read_hosts(hostfile), nodes=nodes, processes=processes) if hostfile else ()
    nodes = len(hosts) or nodes or 1
    processes = hosts[0].slots if hosts else processes or 1
    enough = -(-settings.min_ranks // processes) if settings.min_ranks else nodes
    carried = {name: value for name, value in os.environ.items() if hosts and name.startswith(_CARRIED)}
    return Job(
        recipe=recipe,
        overrides=tuple(overrides),
        strategy=settings.name,
        nodes=nodes,
        processes=processes,
        hosts=hosts,
        environment={**carried, **dict(map(_variable, environment))},
        min_nodes=enough if enough < nodes else None,
        **{name: value for name, value in options.items() if value is not None},
    )


def plan(kind: str, job: Job, **options: Any) -> Launch:
    """How `kind`, one of KINDS, starts `job`.

    Args:
        kind: the key of KINDS.
        job: what to start.
        options: keywords that the `plan` of this kind alone takes.

    Raises:
        ValueError: this kind cannot start such a job, or does not take such an option; says why and what can.
    """
    module = import_module(KINDS[kind])
    for name in options.keys() - signature(module.plan).parameters.keys():
        raise ValueError(f"{kind} takes no --{name}; leave it out")
    launch: Launch = module.plan(job, **options)
    return launch


def run(launch: Launch, job: Job) -> int:
    """Write the files of `launch` and run it to its end; the exit code.

    Raises:
        ValueError: it is for machines that have no names yet.
    """
    from launch.local import run as run_here
    from launch.remote import run_on_hosts

    if not launch.hosts and not launch.command:
        raise ValueError(f"--run needs the names of the {job.nodes} machines; give a hostfile with --hosts")
    write_files(launch.files)
    if launch.hosts:
        return run_on_hosts(launch.hosts, folder=os.getcwd(), processes=job.processes, min_hosts=launch.min_hosts)
    return run_here(launch.command, processes=job.processes, stop=launch.stop)


def write_files(files: Mapping[str, str]) -> None:
    """Write each file (path → content), with the folders above it."""
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--env {text!r} is not NAME=VALUE, for example --env NCCL_DEBUG=INFO")
    return name, value
