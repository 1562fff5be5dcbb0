"""What torchrun and `accelerate launch`, which is torchrun underneath, have in common.

One launcher runs on every host. They meet at the first host (c10d: static addresses would let each host start its
processes again alone, when one of them dies), and pass signals on to their processes.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable

from launch.job import Job, Launch, with_variables
from launch.local import SIGNALS


def here(job: Job, command: list[str]) -> Launch:
    """A launch that is one command on this machine."""
    command = with_variables(job.environment, command)
    return Launch(text=f"{shlex.join(command)}\n", command=command)


def everywhere(job: Job, command: Callable[[str, int, str], list[str]]) -> Launch:
    """A launch that is a command on every host; without hosts their names are left to be filled in.

    Args:
        job: the job; `job.hosts` are all of its machines, or empty.
        command: (name of the first host, number of this one from 0, its own name) → its command.
    """
    signals = ",".join(number.name for number in SIGNALS)
    variables = {"PET_SIGNALS_TO_HANDLE": signals, **job.environment}
    names = [host.name for host in job.hosts] or [f"HOST_{i}" for i in range(job.nodes)]
    commands = {name: with_variables(variables, command(names[0], i, name)) for i, name in enumerate(names)}
    folder = shlex.quote(os.getcwd())
    text = "".join(f"# {name}\ncd {folder} && {shlex.join(words)}\n" for name, words in commands.items())
    if not job.hosts:
        return Launch(text=f"# with {', '.join(names)} replaced by the machines' names\n{text}", command=[])
    return Launch(text=text, command=[], hosts=commands, min_hosts=job.min_nodes)


def leads(number: int) -> str:
    """The --rdzv-conf that tells host `number` whether it holds the rendezvous; torchrun would guess from its name.

    The others wait for the first host as long as everybody waits for the last: hosts start at different speeds.
    """
    return f"is_host={int(number == 0)},join_timeout=900,read_timeout=900"
