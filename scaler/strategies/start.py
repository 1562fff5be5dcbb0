"""How a training process starts: its place among the others, its device, and what the launcher asked for.

`accelerate launch`, torchrun and a bare `python -m` all end here. Accelerate starts the processes and carries the
user's configuration; which strategy it names is read from its plugin, field by field, and honoured or refused by name.
(Handing the model to `Accelerator` instead would silently run DDP on a CPU machine.)
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin

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


def resolve_strategy(settings: Any) -> Any:
    """The recipe's strategy section with every "auto" replaced by the launcher's word or the default.

    Accelerate's own defaults (mixed precision "no", …) count as silence.

    Raises:
        ValueError: recipe and launcher disagree, or the launcher asks for something that is not honoured.
    """
    asked = launcher_settings()
    merged = {}
    for key, value in asked.items():
        mine = getattr(settings, key)
        explicit = key in settings.model_fields_set and mine != "auto"
        if explicit and mine != value:
            raise ValueError(
                f"strategy.{key}: the recipe says {mine!r} and the launcher's configuration {value!r}; "
                "change one of them, or leave it out of the recipe to take the launcher's"
            )
        merged[key] = value
    defaults = {"name": "ddp", "precision": "fp32"}
    for key, value in defaults.items():
        if getattr(settings, key) == "auto":
            merged.setdefault(key, value)
    return settings.model_copy(update=merged)


def launcher_settings() -> dict[str, Any]:
    """What `accelerate launch` was configured to do, as keys of the recipe's strategy section.

    Raises:
        ValueError: DeepSpeed, FSDP version 1, or an FSDP field that this toolkit does not honour.
    """
    asked: dict[str, Any] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16"):
        asked["precision"] = precision
    elif precision != "no":
        raise ValueError(f"accelerate's mixed_precision {precision!r} is not supported; use no, bf16 or fp16")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("the launcher asks for DeepSpeed, which this version does not run; use FSDP2 or DDP")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return asked
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("the launcher asks for FSDP version 1; set fsdp_version: 2 in accelerate's fsdp_config")
    plugin = FullyShardedDataParallelPlugin()
    refused = {
        "fsdp_auto_wrap_policy": os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP",
        "fsdp_ignored_modules": bool(plugin.ignored_modules),
        "fsdp_activation_checkpointing_offload": bool(getattr(plugin, "activation_checkpointing_offload", False)),
    }
    for field, present in refused.items():
        if present:
            raise ValueError(f"accelerate's {field} is not honoured: every block is one FSDP2 unit; remove it")
    asked["name"] = "fsdp2"
    asked["reshard_after_forward"] = bool(plugin.reshard_after_forward)
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        asked["cpu_offload"] = True
    if plugin.activation_checkpointing:
        asked["activation_checkpointing"] = "blocks"
    return asked
