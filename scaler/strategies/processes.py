"""How a training process starts: its place among the others, and its device.

`accelerate launch`, `deepspeed`, torchrun, srun and a bare `python -m` all end here.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from scaler.collectives import World


def start_processes(*, timeout_minutes: float = 30) -> tuple[World, torch.device]:
    """Join the process group that the launcher's environment describes (one process without a launcher).

    A group of one is real too, so that FSDP2 runs on a single device. A process that has joined a group already stays
    in it.

    Returns:
        The world and this process's device.

    Raises:
        ValueError: the launcher's environment is incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start at most one process per GPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return World.current(), device
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_store(size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    return World(rank=rank, size=size), device


def _store(size: int) -> Any:
    """The rendezvous store; a restarted group gets its own namespace, since gloo addresses of the dead stay behind."""
    if size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun or accelerate")
    if int(os.environ["MASTER_PORT"]) == 0:
        raise ValueError("MASTER_PORT is 0, at which nobody can meet; give torchrun --standalone or a --master-port")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=None if agent_store else size,
        is_master=not agent_store and os.environ["RANK"] == "0",
        multi_tenant=True,
    )
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
