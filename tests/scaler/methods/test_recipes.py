"""The recipes of SimCLR and DINOv2 say what the published ones say, build, and can be laid out as their headers say."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import timm
import torch

from scaler.collectives import World
from scaler.layout import batch_layout
from scaler.methods import method_class
from scaler.methods.dinov2.settings import Settings
from scaler.methods.simclr.augment import make_color
from scaler.methods.simclr.settings import SimCLRSettings
from scaler.recipe import Recipe, find_recipe, load_recipe

NAMES = sorted(
    f"{name}/{path.stem}" for name in ("simclr", "dinov2") for path in find_recipe(f"{name}/demo").parent.glob("*.yaml")
)
SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 96, "num_heads": 4}  # of everything but what is checked
HEADS: dict[str, dict[str, Any]] = {
    "dinov2": {"num_prototypes": 16, "head_hidden": 8, "head_bottleneck": 8},
    "simclr": {"head_hidden": 8},
}
MILLIONS = {"small": 22, "base": 86, "large": 304, "giant": 1135}  # parameters, as published


def test_the_set_is_complete() -> None:
    wanted = {
        "dinov2": "vits16_in1k vitb16_in1k vitl16_in1k vitg14_in1k vits14_long vitb14_long vitl14_long vitg14_long "
        "vitl16_reg4_in1k vitl14_reg4_long vitl14_highres vitl14_gram small_data demo",
        "simclr": "resnet50_in1k vits16_in1k vitb16_in1k resnet18_cifar vits4_cifar vitb4_cifar resnet18_article demo",
    }
    assert {f"{method}/{name}" for method, names in wanted.items() for name in names.split()} == set(NAMES)


@functools.cache
def millions(backbone: str) -> float:
    """Parameters of a timm model in millions."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(backbone, num_classes=0, img_size=224).parameters()) / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_recipes_build_and_their_headers_hold(name: str) -> None:
    path = find_recipe(name)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f" {name} " in header and "Cost:" in header and "Result" in header
    recipe = load_recipe(name)
    method = build(recipe)
    batch, micro = recipe.data.global_batch_size, recipe.strategy.micro_batch_size
    started = [int(p) * int(n or 1) for p, n in re.findall(r"--nproc-per-node (\d+)(?: --nnodes (\d+))?", header)]
    for ranks in started or [1]:  # a line that launches the recipe must not be refused
        layout = batch_layout(batch, micro_batch_size=micro, ranks=ranks)
        method.check_layout(num_micro_batches=layout.num_micro_batches, micro_batch_size=layout.micro_batch_size)
    steps = {"total": 10**6}
    told = method.advice(
        num_samples=None, global_batch_size=batch, steps=lambda text: steps.get(text, 0), optim=recipe.optim
    )
    assert not [line for line in told if line.startswith("warning")], told
    backbone = recipe.method.backbone
    size = next((size for size in MILLIONS if f"_{size}_" in backbone), None)
    if size and recipe.data.image_size > 32:
        assert millions(backbone) == pytest.approx(MILLIONS[size], rel=0.02)


def build(recipe: Recipe) -> Any:
    """The recipe's method, shallow and narrow."""
    changes = dict(HEADS[recipe.method.name])
    if recipe.method.backbone.startswith("vit_"):
        changes |= SMALL
    settings = type(recipe.method)(**{**recipe.method.model_dump(), **changes})
    return method_class(settings.name)(settings, image_size=recipe.data.image_size, world=World())


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
    registers = load_recipe("dinov2/vitl16_reg4_in1k")
    assert registers.method == method.model_copy(update={"registers": 4}) and registers.optim == optim


def test_vit_giant_is_the_published_long_recipe() -> None:
    recipe = load_recipe("dinov2/vitg14_long")
    optim, schedule, method = recipe.optim, recipe.schedule, recipe.method
    assert (method.backbone, method.local_size, method.drop_path) == ("vit_giant_patch14_dinov2", 98, 0.4)
    assert (method.num_prototypes, method.head_bottleneck, method.separate_heads) == (131072, 384, True)
    assert (method.centering, method.momentum, method.momentum_end, method.group_size) == ("sinkhorn", 0.994, 1.0, 12)
    assert optim.scaled_lr(1024) == pytest.approx(2e-4) and optim.clip_norm == 3.0
    assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.2)
    assert (optim.layer_decay, optim.patch_embed_lr_scale) == (1.0, 0.2)
    # 500 epochs, 80 of warm-up, of 1,250 steps
    assert (schedule.total, schedule.warmup, schedule.final_lr) == ("625000 steps", "100000 steps", 1e-6)
    large = load_recipe("dinov2/vitl14_long")
    assert large.method == method.model_copy(update={"backbone": "vit_large_patch14_dinov2", "group_size": 32})
    assert (large.optim, large.schedule) == (optim, schedule)
    highres = load_recipe("dinov2/vitl14_highres")
    assert highres.data.image_size == 518 and highres.schedule.total == "10000 steps"
    same = {"weights", "local_size", "group_size", "teacher_temperature_warmup", "freeze_last_layer"}
    assert highres.method.model_dump(exclude=same) == large.method.model_dump(exclude=same)
    gram = load_recipe("dinov2/vitl14_gram").method
    assert (gram.gram_weight, gram.gram_size_factor, gram.gram_refresh) == (2.0, 2, "10000 steps")


def test_simclrs_recipes_are_the_published_ones() -> None:
    resnet = load_recipe("simclr/resnet50_in1k")
    assert resnet.optim.scaled_lr(4096) == pytest.approx(4.8)
    assert (resnet.optim.name, resnet.optim.weight_decay, resnet.optim.eta) == ("lars", 1e-6, 0.001)
    assert (resnet.schedule.warmup, resnet.method.temperature) == ("10 epochs", 0.1)
    for name in ("vits16_in1k", "vitb16_in1k"):  # MoCo-v3's
        vit = load_recipe(f"simclr/{name}")
        assert vit.optim.scaled_lr(256) == pytest.approx(1.5e-4) and vit.optim.weight_decay == 0.1
        assert (vit.schedule.total, vit.schedule.warmup, vit.method.temperature) == ("300 epochs", "40 epochs", 0.2)
        assert vit.method.frozen_patch_embed and vit.method.sincos_positions
        assert vit.method.initial_weights == "moco_v3"
    for name in ("resnet18_cifar", "vits4_cifar", "vitb4_cifar"):
        cifar = load_recipe(f"simclr/{name}")
        color = make_color(cifar.method, image_size=32)
        assert (color.brightness, color.hue, color.blur_p, color.jitter_p) == (0.4, 0.1, 0.0, 0.8)
        assert (cifar.method.temperature, cifar.data.global_batch_size) == (0.5, 512)
        assert cifar.method.small_stem == (cifar.method.backbone == "resnet18")


def test_the_articles_recipe() -> None:
    recipe = load_recipe("simclr/resnet18_article")
    color = make_color(recipe.method, image_size=recipe.data.image_size)
    assert (color.brightness, color.contrast, color.saturation, color.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (color.blur_p, color.blur_kernel, color.blur_sigma, color.grayscale_p) == (1.0, 23, (0.1, 2.0), 0.2)
    assert isinstance(recipe.method, SimCLRSettings)
    method = method_class("simclr")(recipe.method, image_size=64, world=World())
    assert method.normalization == ((0.0,) * 3, (1.0,) * 3)
    assert [tuple(p.shape) for n, p in method.head.named_parameters() if n.endswith("weight")] == [
        (2048, 512),
        (128, 2048),
    ]
    assert recipe.method.temperature == 0.5


def test_small_data_is_told_nothing_where_it_fits() -> None:
    recipe = load_recipe("dinov2/small_data")
    method = build(recipe)
    method.settings = recipe.method
    lengths = {"total": 30_000, "9000 steps": 9000, "300 steps": 300}
    common: dict[str, Any] = {"global_batch_size": 256, "steps": lengths.__getitem__, "optim": recipe.optim}
    assert method.advice(num_samples=5_000, **common) == []
    (line,) = method.advice(num_samples=400, **common)
    assert "method.num_prototypes=512" in line  # the nearest power of two
