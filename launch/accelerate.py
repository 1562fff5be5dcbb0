"""Accelerate's launcher: on this machine, or one on every host, which meet at the first one and start again together.

    accelerate launch --config_file configs/accelerate/fsdp2_nodes.yaml --machine_rank 0 … -m scaler.train RECIPE …

The configuration file names the strategy; underneath it is torchrun that starts the processes, always on all of the
machines: it does not go on with fewer.
"""

from __future__ import annotations

from launch.elastic import everywhere, here, leads
from launch.job import Job, Launch
from launch.local import accelerate_command, train_command


def plan(job: Job) -> Launch:
    """How `accelerate launch` starts `job`.

    Raises:
        ValueError: no configuration for this strategy.
    """
    if job.nodes == 1 and not job.hosts:
        alone = train_command(
            job.recipe,
            job.overrides,
            processes=job.processes,
            strategy=job.strategy,
            max_restarts=job.max_restarts,
        )
        return here(job, alone)
    launcher = accelerate_command(f"{'ddp' if job.strategy == 'auto' else job.strategy}_nodes")
    size = ["--num_machines", str(job.nodes), "--num_processes", str(job.nodes * job.processes)]

    def command(first: str, number: int, name: str) -> list[str]:
        address = ["--main_process_ip", first, "--main_process_port", str(job.port), "--machine_rank", str(number)]
        # rdzv_backend is not read from a configuration file.
        meet = ["--rdzv_backend", "c10d", "--rdzv_conf", leads(number), "--max_restarts", str(job.max_restarts)]
        return ["env", f"PET_LOCAL_ADDR={name}", *launcher, *size, *address, *meet, *job.train]

    return everywhere(job, command)
