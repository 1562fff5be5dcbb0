"""What every launcher is given, and what it answers.

    job = Job(recipe="dinov2/vitl16_in1k", overrides=("data.shards=shards/train",), nodes=4, processes=8)
    launch = torchrun.plan(job)
    print(launch.text)

A launcher is one module here with `plan(job) -> Launch`, and a line in `launch.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Host:
    """A machine by the name under which ssh and the other machines reach it, and its processes (GPUs)."""

    name: str
    slots: int


@dataclass(frozen=True)
class Job:
    """A training to start.

    Attributes:
        recipe: path or short name, handed on as it is.
        overrides: `key=value` words, handed on as they are.
        strategy: the recipe's strategy.name ("auto" included).
        nodes: machines.
        processes: on each machine, one per GPU.
        hosts: the machines by name; empty: this one, or those that a scheduler will give.
        port: at which the processes meet on the first machine.
        max_restarts: how often a group of which a process died is started again.
        environment: variables that every process gets.
        min_nodes: machines that are enough to go on with when others are lost; None: all of them.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    strategy: str = "auto"
    nodes: int = 1
    processes: int = 1
    hosts: tuple[Host, ...] = ()
    port: int = 29500
    max_restarts: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)
    min_nodes: int | None = None

    @property
    def train(self) -> list[str]:
        """The words after `python`, torchrun or `accelerate launch` that start one process of the training."""
        return ["-m", "scaler.train", self.recipe, *self.overrides]


@dataclass(frozen=True)
class Launch:
    """How to start a job.

    Attributes:
        text: what is printed: complete commands (one a host where they differ) or a whole file, ready to be copied.
        command: what `--run` executes on this machine.
        files: files that `command` needs, path → content; `--run` writes them first.
        hosts: instead of `command`, what `--run` executes on each host over ssh, all of them at once.
        min_hosts: how many of `hosts` are enough to go on when others fail; None: all of them.
        stop: what makes `command` stop, where it does not pass signals on; empty: it does.
    """

    text: str
    command: list[str]
    files: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, list[str]] = field(default_factory=dict)
    min_hosts: int | None = None
    stop: list[str] = field(default_factory=list)


def with_variables(values: Mapping[str, str], command: list[str]) -> list[str]:
    """`command` behind `env`, which sets these variables for it."""
    return ["env", *(f"{name}={value}" for name, value in values.items()), *command] if values else command
