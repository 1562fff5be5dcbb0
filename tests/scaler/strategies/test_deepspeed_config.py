"""The user's DeepSpeed file and the recipe: merged where they speak of different things, an error by name where not."""

from __future__ import annotations

import json

import pytest

from scaler.recipe import StrategySettings
from scaler.strategies.deepspeed_config import merged_config, offload_device


def merged(config: object, *, stage: int = 2, precision: str = "fp32", trained: int = 1000) -> dict:
    settings = StrategySettings(name=f"zero{stage}", precision=precision, deepspeed_config=config)
    return merged_config(settings, stage=stage, trained_parameters=trained)


def test_without_a_file_the_recipe_says_everything_that_deepspeed_would_default():
    config = merged(None)
    assert config["gradient_clipping"] == 0.0 and config["zero_optimization"]["stage"] == 2
    assert config["torch_autocast"]["enabled"] is False and config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert merged(None, trained=10**9)["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert merged(None, precision="bf16")["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert merged(None, precision="bf16")["bf16"] == {"enabled": False}
    assert merged(None, stage=3)["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_what_a_recipe_cannot_say_is_kept_and_the_file_is_not_changed(tmp_path):
    theirs = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 7},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(theirs))
    config = merged(str(path))
    assert config == merged(theirs) and theirs["gradient_clipping"] == "auto"
    assert config["zero_optimization"]["reduce_bucket_size"] == 7 and config["wall_clock_breakdown"] is True
    assert "train_batch_size" not in config and config["gradient_clipping"] == 0.0
    assert offload_device(config, "offload_optimizer") == "cpu" and offload_device(config, "offload_param") is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but strategy.name zero2 makes it 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but optim.clip_norm"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is True, but strategy.precision .*torch_autocast"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but strategy.precision makes it False"),
        ({"train_batch_size": 2048}, "train_batch_size is 2048, .*data.global_batch_size is the batch"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is .*the recipe's optim section"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is .*the recipe's schedule section"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients is True"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size is 8"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer goes to nvme"),
    ],
)
def test_what_contradicts_the_recipe_is_an_error_by_name(config, said):
    with pytest.raises(ValueError, match=rf"the DeepSpeed configuration: (zero_optimization\.)?{said}"):
        merged(config)


def test_a_whole_parameter_would_not_see_the_moving_average():
    with pytest.raises(ValueError, match="stage3_param_persistence_threshold is 100000, but the moving average"):
        merged({"zero_optimization": {"stage3_param_persistence_threshold": 100_000}}, stage=3)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[1]", "holds no JSON object"), (None, "cannot read")]
)
def test_an_unreadable_file_is_named(tmp_path, text, said):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"strategy.deepspeed_config: .*ds.json.*{said}|{said} .*ds.json"):
        merged(str(path))
