"""The `deepspeed` command: processes on this machine, or on the hosts of a hostfile through pdsh and ssh.

    deepspeed --hostfile RUN/launch/hostfile --master_addr node-1 … --module scaler.train RECIPE …

It says nothing about a strategy: the recipe's strategy.name decides (zero1, zero2, zero3, or any other). It does not
start a group again in which a process died, and tells the processes to stop on SIGTERM and SIGINT only.
"""

from __future__ import annotations

import base64
import json
import shlex
import signal
import sys
from pathlib import Path

from launch.job import Job, Launch, with_variables
from scaler.recipe import load_recipe


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
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={job.port}", "--module", *job.train[1:]]
    command = with_variables(job.environment, command)
    note = f"# what `deepspeed --num_gpus {job.processes}` would start, which passes no signal on\n"
    return Launch(text=f"{note}{shlex.join(command)}\n", command=command, stop_signal=signal.SIGTERM)


def _over_hosts(job: Job) -> Launch:
    folder = Path(load_recipe(job.recipe, overrides=job.overrides).run.dir) / "launch"
    hostfile, variables = folder / "hostfile", folder / "environment"
    files = {str(hostfile): "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)}
    environment = {"PDSH_RCMD_TYPE": "ssh"}
    if job.environment:  # DeepSpeed carries over a few variables of its own choice, and those in this file
        files[str(variables)] = "".join(f"{name}={value}\n" for name, value in job.environment.items())
        environment["DS_ENV_FILE"] = str(variables.absolute())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--launcher", "pdsh"]
    command += ["--hostfile", str(hostfile), "--force_multi"]  # it would take a single host for this machine
    command += ["--master_addr", job.hosts[0].name, "--master_port", str(job.port), "--module", *job.train[1:]]
    command = with_variables(environment, command)
    text = f"mkdir -p {shlex.quote(str(folder))}\n"
    text += "".join(f"cat > {shlex.quote(path)} <<'END'\n{content}END\n" for path, content in files.items())
    text += f"{shlex.join(command)}\n"
    return Launch(text=text, command=command, files=files, stop_signal=signal.SIGTERM)
