"""What the launcher asked for, beside what the recipe says.

`accelerate launch` carries the user's configuration: which strategy it names is read from its plugins, field by field,
and honoured or refused by name. (Handing the model to `Accelerator` instead would silently run DDP on a CPU machine.)
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin


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
