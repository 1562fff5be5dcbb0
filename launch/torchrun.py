"""torchrun: on this machine, or one on every host, which meet at the first one and start again together.

    python -m torch.distributed.run --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d … -m scaler.train RECIPE …

torchrun says nothing about a strategy: the recipe's strategy.name decides, and auto is DDP.
"""

from __future__ import annotations

import sys

from launch.elastic import everywhere, here, leads
from launch.job import Job, Launch


def plan(job: Job) -> Launch:
    """How torchrun starts `job`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    common = ["--nproc-per-node", str(job.processes), "--max-restarts", str(job.max_restarts)]
    if job.nodes == 1 and not job.hosts:
        return here(job, [*torchrun, "--standalone", *common, *job.train])

    nodes = str(job.nodes) if job.min_nodes is None else f"{job.min_nodes}:{job.nodes}"

    def command(first: str, number: int, name: str) -> list[str]:
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{job.port}", "--rdzv-conf", leads(number)]
        return [*torchrun, "--nnodes", nodes, *common, *meet, "--local-addr", name, *job.train]

    return everywhere(job, command)
