"""The `deepspeed` command: processes on this machine, or on the hosts of a hostfile through pdsh and ssh.

    deepspeed --hostfile RUN/launch/hostfile --master_addr node-1 … --module scaler.train RECIPE …

It says nothing about a strategy: the recipe's strategy.name decides (zero1, zero2, zero3, or any other). It does not
start a group again in which a process died, and tells the processes to stop on SIGTERM and SIGINT only.
"""

from __future__ import annotations

import base64
import json
import shlex
import sys
from pathlib import Path

from launch.job import Job, Launch, with_variables
from scaler.recipe import load_recipe

_HERE = "127.0.0.1"


def plan(job: Job) -> Launch:
    """How `deepspeed` starts `job`.

    Raises:
        ValueError: several machines without a name.
    """
    if job.hosts:
        return _over_hosts(job)
    if job.nodes > 1:
        raise ValueError(f"deepspeed reaches its {job.nodes} machines by name; give a hostfile with --hosts")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(job.processes))}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    command += [f"--master_addr={_HERE}", f"--master_port={job.port}", "--module", *job.train[1:]]
    command = with_variables(job.environment, command)
    text = f"# what `deepspeed --num_gpus {job.processes}` would start, and would not pass a signal on to\n"
    stop = _stop(_HERE, job.port)
    return Launch(text=f"{text}{shlex.join(command)}\n{_note(stop)}", command=command, stop=stop)


def _over_hosts(job: Job) -> Launch:
    first, folder = job.hosts[0].name, Path(load_recipe(job.recipe, overrides=job.overrides).run.dir) / "launch"
    hostfile, variables = folder / "hostfile", folder / "environment"
    files = {str(hostfile): "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)}
    environment = {"PDSH_RCMD_TYPE": "ssh"}
    if job.environment:  # DeepSpeed carries over a few variables of its own choice, and those in this file
        files[str(variables)] = "".join(f"{name}={value}\n" for name, value in job.environment.items())
        environment["DS_ENV_FILE"] = str(variables.absolute())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--launcher", "pdsh", "--hostfile", str(hostfile)]
    command += ["--force_multi"]  # or it takes a single host for this machine
    command += ["--master_addr", first, "--master_port", str(job.port), "--module", *job.train[1:]]
    command = with_variables(environment, command)
    text = f"mkdir -p {shlex.quote(str(folder))}\n"
    text += "".join(f"cat > {shlex.quote(path)} <<'END'\n{content}END\n" for path, content in files.items())
    stop = ["pdsh", "-R", "ssh", "-w", ",".join(host.name for host in job.hosts), shlex.join(_stop(first, job.port))]
    return Launch(text=f"{text}{shlex.join(command)}\n{_note(stop)}", command=command, files=files, stop=stop)


def _stop(address: str, port: int) -> list[str]:
    """Tells this job's launcher on a host to stop its processes; they have 30 s for a checkpoint."""
    # The runner's own way ends the connections first, and with them processes that still have something to say. pdsh,
    # ssh and shells have the same words in their command lines, but not at the start.
    launcher = f"^{sys.executable} (-u )?-m deepspeed.launcher.launch "
    return ["pkill", "-TERM", "-f", f"{launcher}.*--master_addr={address} --master_port={port} "]


def _note(stop: list[str]) -> str:
    return f"# to stop it after a checkpoint:\n#   {shlex.join(stop)}\n"
