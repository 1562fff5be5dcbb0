"""What `accelerate launch` says is taken over field by field, or refused by name."""

from __future__ import annotations

import json

import pytest

from scaler.recipe import StrategySettings
from scaler.strategies.launcher import resolve_strategy

# The variables that accelerate 1.15 sets for each of configs/accelerate (`accelerate launch --config_file F` of a
# script that prints its environment).
FSDP2 = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
HYBRID = {
    **FSDP2,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "WORLD_SIZE": "8",
}
ZERO = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.fixture
def launched(monkeypatch):
    def launch(variables: dict[str, str], **settings: object) -> StrategySettings:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return resolve_strategy(StrategySettings(**settings))

    return launch


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, {"name": "ddp", "precision": "fp32"}),
        (FSDP2, {"name": "fsdp2", "shard_group": "all", "reshard_after_forward": True, "cpu_offload": False}),
        (HYBRID, {"name": "fsdp2", "shard_group": 4}),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, {"cpu_offload": True}),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"reshard_after_forward": False}),
        (ZERO, {"name": "zero2", "deepspeed_config": None, "precision": "fp32"}),
        ({**ZERO, "ACCELERATE_MIXED_PRECISION": "bf16"}, {"name": "zero2", "precision": "bf16"}),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
        ),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"name": "zero2"}),
    ],
)
def test_auto_takes_the_launchers_word(launched, variables, wanted):
    settings = launched(variables)
    assert {key: getattr(settings, key) for key in wanted} == wanted


def test_a_deepspeed_file_says_the_stage(launched, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    settings = launched(variables)
    assert (settings.name, settings.deepspeed_config) == ("zero3", str(path))


@pytest.mark.parametrize(
    ("variables", "settings", "said"),
    [
        (FSDP2, {"name": "zero2"}, "the recipe says 'zero2' and the launcher's configuration 'fsdp2'"),
        (ZERO, {"name": "zero3"}, "the recipe says 'zero3' and the launcher's configuration 'zero2'"),
        ({**FSDP2, "FSDP_VERSION": "1"}, {}, "FSDP version 1"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "fsdp_auto_wrap_policy is not honoured"),
        ({**HYBRID, "WORLD_SIZE": "6"}, {}, "2 copies x 4 ranks, and 6 ranks were started"),
        ({**HYBRID, "PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "parallelism_config_tp_size 2 is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "mixed_precision 'fp8' is not supported"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, "gradient_clipping 1.0 has no effect"),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation_steps 4 has no effect"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "does not pass on offload_param_nvme_path"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "ZeRO stage 0; use 1, 2 or 3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "ZeRO stage None"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(launched, variables, settings, said):
    with pytest.raises(ValueError, match=said):
        launched(variables, **settings)
