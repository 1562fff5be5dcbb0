"""The configuration that DeepSpeed is started with: the user's own file, with what the recipe says merged in.

The recipe decides the batch, the stage, precision, clipping, optimiser and schedule. The file may say "auto" to any of
them; where it says something else than the recipe, that is an error by name, since one of the two would have no effect.
What is left to the file: offload, bucket sizes, overlap, prefetch, and the like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Keys that would break what is promised of checkpoints or precision, and why.
_REFUSED = {
    "train_batch_size": "data.global_batch_size is the batch",
    "train_micro_batch_size_per_gpu": "strategy.micro_batch_size is the micro-batch",
    "gradient_accumulation_steps": "it follows from data.global_batch_size and strategy.micro_batch_size",
    "optimizer": "the recipe's optim section makes the optimiser",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "amp": "strategy.precision sets the precision",
    "data_types": "gradients are accumulated in fp32",
    "communication_data_type": "gradients travel in the precision of strategy.precision",
    "zero_optimization.round_robin_gradients": "DeepSpeed's map of the optimiser state would be wrong",
    "zero_optimization.zero_hpz_partition_size": "checkpoints are made of one partition over all ranks",
    "zero_optimization.mics_shard_size": "checkpoints are made of one partition over all ranks",
    "zero_optimization.zero_quantized_weights": "weights would not be those of the other strategies",
    "zero_optimization.zero_quantized_nontrainable_weights": "the teacher would not be that of the other strategies",
    "zero_optimization.zero_quantized_gradients": "gradients would not be those of the other strategies",
    "compression_training": "weights would not be those of the other strategies",
    "checkpoint": "the recipe's checkpoint section writes the checkpoints",
}


_BUCKET = 50_000_000  # elements of a buffer in which gradients travel; DeepSpeed's own 5e8 are 2 GB in fp32


def merged_config(settings: Any, *, stage: int, trained_parameters: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`; `settings` is the recipe's strategy section.

    Raises:
        ValueError: the file cannot be read, contradicts the recipe, or asks for what is not supported; names the key.
    """
    config = read_config(settings.deepspeed_config)
    source = settings.deepspeed_config if isinstance(settings.deepspeed_config, str) else "the DeepSpeed configuration"
    for key, reason in _REFUSED.items():
        if not _says_nothing(value := _get(config, key)):
            raise ValueError(
                f"{source}: {key} is {value!r}, which has no effect or is not supported ({reason}); remove it"
            )
        _remove(config, key)
    for what in ("offload_optimizer", "offload_param"):
        if offload_device(config, what) == "nvme":
            raise ValueError(
                f"{source}: zero_optimization.{what} goes to nvme, where neither clipping per module, a moving "
                "average nor a portable checkpoint can reach it; use device cpu"
            )
    for key, value, said_by in _ours(settings, stage=stage):
        theirs = _get(config, key)
        if theirs not in (None, "auto", value):
            raise ValueError(f"{source}: {key} is {theirs!r}, but {said_by} makes it {value!r}; change or remove one")
        _set(config, key, value)
    if _get(config, key := "zero_optimization.reduce_bucket_size") in (None, "auto"):
        _set(config, key, min(_BUCKET, trained_parameters))
    return config


def offload_device(config: Mapping[str, Any], what: str) -> str | None:
    """Where `offload_optimizer` or `offload_param` goes: "cpu", "nvme", or None."""
    device = _get(config, f"zero_optimization.{what}.device")
    return None if device in (None, "none") else str(device)


def _ours(settings: Any, *, stage: int) -> Iterator[tuple[str, Any, str]]:
    """Key, value, and which key of the recipe says so."""
    # The engine's own counting of batches is not used: the loop sets the boundaries (see Zero.accumulate).
    yield "train_micro_batch_size_per_gpu", 1, "the loop"
    yield "gradient_accumulation_steps", 1, "the loop"
    yield "gradient_clipping", 0.0, "optim.clip_norm, which clips per module outside DeepSpeed,"
    yield "zero_optimization.stage", stage, f"strategy.name {settings.name}"
    yield "fp16.enabled", False, "strategy.precision"
    yield "bf16.enabled", False, "strategy.precision (bf16 is torch_autocast, which keeps fp32 weights)"
    yield "torch_autocast.enabled", settings.precision == "bf16", "strategy.precision"
    if settings.precision == "bf16":
        yield "torch_autocast.dtype", "bfloat16", "strategy.precision"
    yield "zero_force_ds_cpu_optimizer", False, "optim.name"
    yield "zero_allow_untested_optimizer", True, "optim.name"
    if stage == 3:
        # A parameter that is kept whole would not see the teacher's moving average, which acts on partitions.
        yield "zero_optimization.stage3_param_persistence_threshold", 0, "the moving average of a teacher"
        yield "zero_optimization.stage3_model_persistence_threshold", 0, "the moving average of a teacher"


def read_config(config: str | dict[str, Any] | None) -> dict[str, Any]:
    """A DeepSpeed configuration from a file, or a copy of one that is given as it is.

    Raises:
        ValueError: the file cannot be read, or holds no JSON object.
    """
    if config is None:
        return {}
    if not isinstance(config, str):
        return json.loads(json.dumps(config))
    try:
        values = json.loads(Path(config).read_text())
    except OSError as error:
        raise ValueError(f"strategy.deepspeed_config: cannot read {config}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"strategy.deepspeed_config: {config} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"strategy.deepspeed_config: {config} holds no JSON object")
    return values


def _says_nothing(value: Any) -> bool:
    """Whether a value is as good as absent: a default, switched off, or left to us."""
    return value is None or value is False or value in ("auto", {}) or (type(value) is int and value in (0, 1))


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value


def _remove(config: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.get(part, {})
    config.pop(last, None)
