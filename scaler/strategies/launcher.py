"""What the launcher asked for, beside what the recipe says.

`accelerate launch` carries the user's configuration: which strategy it names is read from its plugins, field by field,
and honoured or refused by name. (Handing the model to `Accelerator` instead would silently run DDP on a CPU machine.)
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin

from scaler.strategies.deepspeed_config import read_config


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
        ValueError: FSDP version 1, no ZeRO stage, or a field that this toolkit does not honour.
    """
    asked: dict[str, Any] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16"):
        asked["precision"] = precision
    elif precision != "no":
        raise ValueError(f"accelerate's mixed_precision {precision!r} is not supported; use no, bf16 or fp16")
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        return asked | _deepspeed_settings()
    if _is_true("ACCELERATE_USE_FSDP"):
        return asked | _fsdp_settings()
    return asked


def _fsdp_settings() -> dict[str, Any]:
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
    asked: dict[str, Any] = {"name": "fsdp2", "reshard_after_forward": bool(plugin.reshard_after_forward)}
    if _is_true("FSDP_OFFLOAD_PARAMS"):
        asked["cpu_offload"] = True
    if plugin.activation_checkpointing:
        asked["activation_checkpointing"] = "blocks"
    if _is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked["shard_group"] = _shard_group()
    return asked


def _shard_group() -> int:
    """Ranks that hold one copy of the model between them, by accelerate's parallelism_config."""
    sizes = {axis: int(os.environ.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1")) for axis in _AXES}
    for axis in ("TP", "CP", "SP"):
        if sizes[axis] > 1:
            raise ValueError(
                f"accelerate's parallelism_config_{axis.lower()}_size {sizes[axis]} is not supported: images are "
                "trained data-parallel; set it to 1"
            )
    replicate, shard = sizes["DP_REPLICATE"], sizes["DP_SHARD"]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if replicate * shard != ranks:
        raise ValueError(
            f"accelerate's parallelism_config says {replicate} copies x {shard} ranks, and {ranks} ranks were started; "
            "make dp_replicate_size x dp_shard_size the number of ranks"
        )
    return shard


_AXES = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")


def _deepspeed_settings() -> dict[str, Any]:
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "1"):
        raise ValueError(
            f"accelerate's gradient_accumulation_steps {steps} has no effect: accumulation follows from "
            "data.global_batch_size and strategy.micro_batch_size; remove it"
        )
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping.lower() not in ("none", "auto", "0", "0.0"):
        raise ValueError(f"accelerate's gradient_clipping {clipping} has no effect: optim.clip_norm clips; remove it")
    if (path := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        stage = read_config(path).get("zero_optimization", {}).get("stage")
        return {"name": _zero(stage, said_by=path), "deepspeed_config": path}
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    asked: dict[str, Any] = {"name": _zero(stage, said_by="accelerate's deepspeed_config")}
    offload = {}
    for what in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device == "nvme":
            raise ValueError(
                f"accelerate does not pass on offload_{what}_nvme_path; put offload_{what} into a DeepSpeed file and "
                "name that as deepspeed_config_file, or as the recipe's strategy.deepspeed_config"
            )
        if device != "none":
            offload[f"offload_{what}"] = {"device": device}
    if offload:
        asked["deepspeed_config"] = {"zero_optimization": offload}
    return asked


def _zero(stage: Any, *, said_by: str) -> str:
    if str(stage) not in ("1", "2", "3"):
        raise ValueError(f"{said_by} asks for ZeRO stage {stage}; use 1, 2 or 3 (or configs/accelerate/ddp.yaml)")
    return f"zero{stage}"


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
