"""The recipes say what the published ones say, and their layouts hold whole groups."""

from __future__ import annotations

import math

import pytest

from scaler.methods.dinov2.settings import Settings
from scaler.recipe import load_recipe


def test_vit_large_is_the_published_short_recipe() -> None:
    recipe = load_recipe("dinov2/vitl16_in1k")
    optim, schedule, method = recipe.optim, recipe.schedule, recipe.method
    assert recipe.data.global_batch_size == 2048 and recipe.data.image_size == 224
    assert optim.scaled_lr(2048) == pytest.approx(0.004 * math.sqrt(2))
    assert (optim.weight_decay, optim.weight_decay_end, optim.clip_norm) == (0.04, 0.4, 3.0)
    assert (optim.layer_decay, optim.patch_embed_lr_scale, optim.betas) == (0.9, 0.2, (0.9, 0.999))
    assert (schedule.total, schedule.warmup, schedule.final_lr) == ("125000 steps", "12500 steps", 1e-6)
    published = Settings(  # 30 epochs and 1 epoch of 1,250 steps
        centering="softmax", blur="released", teacher_temperature_warmup="37500 steps", freeze_last_layer="1250 steps"
    )
    assert method == published
    assert (method.drop_path, method.layer_scale, method.num_prototypes, method.group_size) == (0.3, 1e-5, 65536, 64)
    assert (method.teacher_temperature, method.warmup_teacher_temperature, method.momentum) == (0.07, 0.04, 0.992)
    assert (method.mask_ratio, method.mask_probability, method.koleo_weight) == ((0.1, 0.5), 0.5, 0.1)


@pytest.mark.parametrize("name", ["vitl16_in1k", "vits16_in1k", "demo"])
def test_micro_batches_hold_whole_groups(name: str) -> None:
    recipe = load_recipe(f"dinov2/{name}")
    micro = recipe.strategy.micro_batch_size or recipe.data.global_batch_size
    assert micro % recipe.method.group_size == 0 and recipe.data.global_batch_size % micro == 0
