"""Starts a training on this machine: one process directly, several through Accelerate's launcher.

    command = train_command("dinov2/demo", ["data.shards=shards/train"], processes=2, strategy="fsdp2")
    exit_code = run(command, processes=2)

The command is an ordinary one that a user can copy. Accelerate only starts the processes and says which strategy is
meant; the files under configs/accelerate work on GPU machines as well as on a CPU box, where `accelerate launch --cpu`
would start a single process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scaler.recipe import find_recipe

# What asks a training to stop; whoever starts one passes these on.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def train_command(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    strategy: str = "auto",
    max_restarts: int = 0,
) -> list[str]:
    """The command that trains `recipe` on `processes` processes of this machine.

    Args:
        recipe: path or short name, handed on as it is.
        overrides: `key=value` words, handed on as they are.
        processes: 1 starts `python -m scaler.train` itself; more go through `accelerate launch`.
        strategy: which of configs/accelerate the launcher reads; auto is ddp.
        max_restarts: how often Accelerate starts all processes again when one died; one process alone is not.

    Raises:
        ValueError: fewer than one process, or no configuration for this strategy.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes cannot train; start 1 or more")
    train = ["-m", "scaler.train", recipe, *overrides]
    if processes == 1:
        return [sys.executable, *train]
    launcher = accelerate_command("ddp" if strategy == "auto" else strategy)
    restarts = ["--max_restarts", str(max_restarts)] if max_restarts else []
    return [*launcher, "--num_processes", str(processes), *restarts, *train]


def accelerate_command(config: str) -> list[str]:
    """`accelerate launch` by this interpreter with a file of configs/accelerate, named without folder and ending.

    Raises:
        ValueError: there is no such file.
    """
    path = _short(find_recipe(f"accelerate/{config}"))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]


def environment(processes: int) -> dict[str, str]:
    """The environment for `processes` processes: what is set here stays, what is missing gets a sensible value.

    OMP_NUM_THREADS shares the cores out (Accelerate would give every process one thread), and torchrun learns to pass
    SIGUSR1 on as it does SIGTERM, so that either saves a checkpoint and leaves.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    signals = ",".join(number.name for number in SIGNALS)
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "PET_SIGNALS_TO_HANDLE": signals}
    return {**defaults, **os.environ}


def run(command: Sequence[str], *, processes: int = 1, stop: Sequence[str] = ()) -> int:
    """Run `command` to its end and return its exit code (128 + n where signal n killed it).

    The child gets a session of its own, so that a Ctrl-C reaches it once: passed on from here, like every other signal
    that asks a training to stop.

    Args:
        command: what to run.
        processes: that it will start, which share the cores out.
        stop: what to run instead of passing such a signal on.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before there was a child to pass them to

    def pass_on(number: int) -> None:
        if child is None:
            early.append(number)
        elif stop:
            subprocess.Popen(stop, start_new_session=True)
        else:
            child.send_signal(number)

    with signals_to(pass_on):
        child = subprocess.Popen(command, env=environment(processes), start_new_session=True)
        for number in early:
            pass_on(number)
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def signals_to(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with each of SIGNALS that this process gets meanwhile."""
    previous = {number: signal.signal(number, lambda got, frame: handle(got)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _short(path: Path) -> Path:
    """`path` from here where it lies below the current folder, for commands that are nice to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
