"""Advice before a run and alarms during one: collapsed models raise them, a model that learns does not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from scaler.methods.dinov2 import health
from scaler.methods.dinov2.method import DINOv2
from scaler.recipe import Optim
from tests.scaler.methods.dinov2.test_method import run_step
from tests.scaler.methods.dinov2.tiny import loader_batch, tiny_method

LATE = {"step": 1000, "last_layer_lr": 1e-3}


def row(method: DINOv2) -> dict[str, float]:
    result = run_step(method, [0, 16], double=False)
    return {**LATE, **{name: float(value) for name, value in result["metrics"].items()}}


@torch.no_grad()
def constant_features(method: DINOv2) -> DINOv2:
    for network in (method.student, method.teacher):
        network.backbone.norm.weight.zero_()
        network.backbone.norm.bias.normal_(generator=torch.Generator().manual_seed(1))
    return method


def test_constant_features_are_alarms_and_not_at_the_start() -> None:
    method = constant_features(tiny_method())
    found = row(method)
    signs = method.symptoms(found)
    assert {"collapsed_features", "empty_targets", "guessing"} <= set(signs)
    assert all(text[0].islower() and "\n" not in text for text in signs.values())
    assert not method.symptoms({**found, "step": 500}) and not method.symptoms({**found, "last_layer_lr": 0.0})


@torch.no_grad()
def test_one_prototype_for_all_images() -> None:
    method = constant_features(tiny_method(centering="softmax"))
    for network in (method.student, method.teacher):
        z = network.dino_head.bottleneck(network.backbone.norm.bias)
        network.dino_head.last_layer.weight_v.copy_(-z)
        network.dino_head.last_layer.weight_v[7] = z
    with torch.enable_grad():
        found = row(method)
    assert set(method.symptoms(found)) == {"collapsed_features", "one_prototype"}


@torch.no_grad()
def test_students_that_choose_other_prototypes() -> None:
    method = tiny_method(drop_path=0.0)
    weights = method.teacher.dino_head.last_layer.weight_v
    method.student.load_state_dict(method.teacher.state_dict())
    method.student.dino_head.last_layer.weight_v.copy_(-weights)
    with torch.enable_grad():
        found = {**row(method), "prototype_entropy": 0.5}
    assert found["agreement"] < 0.025 and set(method.symptoms(found)) == {"guessing"}
    near = {**found, "loss/dino": 0.985 * math.log(40)}
    assert set(method.symptoms({**near, "agreement": 0.0})) == {"guessing"}
    assert not method.symptoms({**near, "agreement": 0.05})


def test_a_model_that_learns_raises_no_alarm() -> None:
    still = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "solarize_probability": 0.0, "blur_kernel": 0}
    method = tiny_method(initial_weights="fan_in", **still)
    batch = loader_batch(method, rows=slice(0, 16))
    tint = torch.randint(0, 128, (16, 3, 1, 1), generator=torch.Generator().manual_seed(2))
    batch["views"] = {name: (view // 2 + tint).to(torch.uint8) for name, view in batch["views"].items()}
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=2e-3)
    hyper = {"momentum": 0.9, "teacher_temperature": 0.03}
    for step in range(80):
        images = method.augment(batch, seed=0, step=step)
        (target,) = method("combine", [method("observe", images, hyper)], hyper)
        out = method("learn", images, target, hyper)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(hyper, lambda targets, sources, weight: torch._foreach_lerp_(targets, sources, weight))
    assert not method.symptoms({**LATE, **{name: float(value) for name, value in out["metrics"].items()}})


def advice(**changes: Any) -> str:
    """What the published short recipe is told, with these changes."""
    method = DINOv2.Settings(group_size=64).model_dump()
    sizes: dict[str, Any] = {"num_samples": 1_281_167, "global_batch_size": 1024}
    lengths = {"total": changes.pop("total", 125_000), "30 epochs": 37_500, "1 epochs": 1250}
    optim = Optim(**{"lr": 4e-3, "lr_rule": "sqrt_1024", **changes.pop("optim", {})})

    def steps(text: str) -> int:
        return lengths[text] if text in lengths else int(text.removesuffix(" steps"))

    sizes |= {key: changes.pop(key) for key in list(changes) if key in sizes}
    lines = list(health.advice(DINOv2.Settings(**{**method, **changes}), **sizes, steps=steps, optim=optim))
    assert all(line.startswith("warning: ") and "\n" not in line for line in lines)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"num_samples": None}, ""),
        ({"num_samples": 4000}, r"4000 images for 65536 prototypes: .* method.num_prototypes=4096"),
        ({"num_samples": 4000, "num_prototypes": 4096}, ""),
        ({"global_batch_size": 32}, "a global batch of 32 images is small for 65536 prototypes"),
        ({"global_batch_size": 512}, "each of its 1024 global crops"),
        ({"global_batch_size": 32, "num_prototypes": 1024}, ""),
        ({"optim": {"lr_rule": "none"}, "global_batch_size": 768}, ""),
        ({"optim": {"lr_rule": "none"}, "global_batch_size": 128, "num_prototypes": 4096},
         "reaches 0.004, where 0.0014 is usual for a batch of 128 images"),
        ({"group_size": 1}, "koleo_weight has no effect"),
        ({"group_size": 1, "koleo_weight": 0.0}, ""),
        ({"momentum": 1.0}, "momentum=1 leaves"),
        ({"momentum": 1.0, "momentum_end": 0.9}, ""),
        ({"center_momentum": 0.5}, "method.center_momentum set, without effect: centring is sinkhorn's"),
        ({"center_momentum": 0.5, "centering": "softmax"}, ""),
        ({"num_local_crops": 0, "local_size": 48, "local_scale": (0.1, 0.3)},
         "method.local_size and method.local_scale set, without effect: there are no local crops"),
        ({"mask_probability": 0.0, "ibot_weight": 2.0}, "ibot_weight set, without effect: no crop is masked"),
        ({"blur_kernel": 0, "blur": "released"}, "blur set, without effect"),
        ({"drop_path": 0.0, "koleo_weight": 0.0, "group_size": 8}, "group_size set, without effect"),
        ({"jitter_probability": 0.0, "hue": 0.3}, "hue set, without effect"),
        ({"total": 1000, "teacher_temperature_warmup": "100 steps", "freeze_last_layer": "0 steps"},
         "about 125 steps, of 1000 in all; lower it, to 0.98"),
        ({"teacher_temperature_warmup": "126000 steps"}, "teacher_temperature_warmup is 126000 steps, longer"),
        ({"teacher_temperature_warmup": "126000 steps", "warmup_teacher_temperature": 0.07}, ""),
        ({"freeze_last_layer": "200000 steps"}, "freeze_last_layer is 200000 steps, longer than the run's 125000"),
    ],
)  # fmt: skip
def test_advice(changes: dict[str, Any], said: str) -> None:
    lines = advice(**changes)
    assert bool(lines) == bool(said) and re.search(said, lines), lines
