"""The references of supervised training and SimCLR compute what ours does, and their steps train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaler.bench.flops import model_flops
from scaler.bench.parts import NAMES
from scaler.bench.references.registry import REFERENCES, why_no_reference
from scaler.bench.references.simclr import SimCLRReference
from scaler.bench.references.supervised import SupervisedReference
from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.supervised.augment import VIEW
from scaler.recipe import Recipe, load_recipe
from scaler.timetable import Timetable
from scaler.train import build_method

CPU = torch.device("cpu")
M = 8
NO_COLOURS = ["method.color_jitter=0", "method.grayscale_probability=0"]
SUPERVISED = [*NO_COLOURS, "method.group_size=4"]
SGD = ["optim.name=sgd", "optim.lr=0.1"]
OF_VITS = {key: "null" for key in ("patch_size", "depth", "embed_dim", "num_heads")}
RESNET = [f"method.{key}={value}" for key, value in OF_VITS.items()]
RESNET += ["method.backbone=resnet10t", "method.initial_weights=published"]


def demo(name: str, *overrides: str) -> Recipe:
    return load_recipe(f"{name}/demo", overrides=[f"data.global_batch_size={M}", *overrides], shards="none")


def raw_batch(method: Any) -> Batch:
    raw = noise(method, M, world=World(), device=CPU)
    return {**raw, "labels": torch.arange(M) % 10}


def differences(recipe: Recipe, reference: Any, smooth: float | None = None) -> tuple[Tensor, Tensor, float]:
    """Our loss, the reference's, and how far apart the gradients are, on one augmented batch.

    `smooth`: label smoothing of mixed targets, which timm's come with.
    """
    ours: Any = build_method(recipe, world=World())
    hyper = Timetable(recipe, num_samples=1000).hyper(ours, 0)
    batch = ours.augment(raw_batch(ours), seed=0, step=0)
    loss = ours("learn", batch, None, hyper)["loss"]
    loss.backward()
    if smooth is not None:
        targets = batch["targets"]
        batch = {**batch, "targets": targets * (1 - smooth) + smooth / targets.shape[1]}
    plain = reference.loss(batch, hyper=hyper)
    plain.backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in reference.parameters.items() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    a, b = (torch.cat([found[name].double().flatten() for name in mine]) for found in (mine, theirs))
    buffers = dict(ours.named_buffers())
    for name, running in reference_buffers(reference).items():
        torch.testing.assert_close(buffers[name], running, rtol=1e-5, atol=1e-6)
    return loss.detach(), plain.detach(), float((a - b).norm() / b.norm())


def reference_buffers(reference: Any) -> dict[str, Tensor]:
    """Running statistics of a ResNet's reference, by our names."""
    model = reference.model if isinstance(reference, SupervisedReference) else reference.backbone
    return {f"backbone.model.{name}": x for name, x in model.named_buffers() if "running" in name}


@pytest.mark.parametrize(
    ("overrides", "smooth"),
    [
        ([*RESNET, *SGD], None),
        ([*RESNET, *SGD, "method.mixup=0.2", "method.cutmix=1.0", "method.mix_by=pair"], 0.1),
        (["method.label_smoothing=0", "method.layer_scale=0.1", "method.registers=2"], None),
    ],
)
def test_supervised_has_our_loss_and_gradients(overrides: list[str], smooth: float | None) -> None:
    recipe = demo("supervised", *SUPERVISED, *overrides)
    reference = SupervisedReference(recipe, precision="fp32", device=CPU)
    loss, plain, apart = differences(recipe, reference, smooth)
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=0)
    assert apart < 1e-5


@pytest.mark.parametrize("lightly", [True, False])
@pytest.mark.parametrize("overrides", [RESNET, ["method.head_layers=3", "method.frozen_patch_embed=true"]])
def test_simclr_has_our_loss_and_gradients(overrides: list[str], lightly: bool) -> None:
    recipe = demo("simclr", *overrides)
    reference = SimCLRReference(recipe, precision="fp32", device=CPU)
    if not lightly:
        reference.contrast = reference._plain_loss
    elif not reference.lightly:
        pytest.skip("lightly is not installed")
    loss, plain, apart = differences(recipe, reference)
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=0)
    assert apart < 1e-5


def test_images_are_normalised_as_ours() -> None:
    recipe = demo("supervised", *SUPERVISED, "method.group_size=4")
    reference = SupervisedReference(recipe, precision="fp32", device=CPU)
    raw = raw_batch(reference.method)
    before = raw["views"][VIEW].clone()
    mine, theirs = reference.method.augment(raw, seed=0, step=0), reference.prepare(raw)
    torch.testing.assert_close(theirs["images"], mine["images"], rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs["targets"], mine["targets"]) and torch.equal(raw["views"][VIEW], before)


@pytest.mark.parametrize("name", ["supervised", "simclr"])
def test_a_first_update_is_ours(name: str) -> None:
    """SGD with weight decay on matrices, and the learning rate of the schedule."""
    recipe = demo(name, *RESNET, *SGD, "schedule.warmup=0 steps", *(SUPERVISED if name == "supervised" else []))
    reference = REFERENCES[name](recipe, precision="fp32", device=CPU)
    parameters: dict[str, Tensor] = reference.parameters  # type: ignore[attr-defined]
    before = {key: p.detach().clone() for key, p in parameters.items()}
    grads: dict[str, Tensor] = {}
    for key, p in parameters.items():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, key=key: grads.update({key: p.grad.clone()}))  # type: ignore
    marks: list[str] = []
    reference.step(iter([[raw_batch(reference.method)]]), marks.append)
    assert marks == [part for part in NAMES if part not in ("observe", "combine")] + ["end"]
    assert grads and reference.number == 1
    for key, grad in grads.items():
        decay = recipe.optim.weight_decay if before[key].ndim > 1 else 0.0
        wanted = before[key] - recipe.optim.lr * (grad + decay * before[key])
        torch.testing.assert_close(parameters[key].detach(), wanted, rtol=1e-5, atol=1e-6)


def test_a_step_with_everything() -> None:
    extras = ["method.mixup=0.2", "method.ema=0.5", "method.erase_probability=0.5", "optim.clip_norm=0.1"]
    recipe = demo("supervised", *SUPERVISED, *RESNET, *SGD, *extras)
    reference = SupervisedReference(recipe, precision="bf16", device=CPU)
    batches = [[raw_batch(reference.method)] for _ in range(2)]
    reference.number = 40  # the warm-up is over
    for _ in range(2):
        reference.step(iter(batches), lambda part: None)
    assert reference.ema is not None
    name, average = next(iter(reference.ema.module.named_parameters()))
    assert not torch.equal(average, dict(reference.model.named_parameters())[name])


def test_recipes_without_reference_say_why() -> None:
    def why(name: str, *overrides: str, **facts: Any) -> str | None:
        given = {"ranks": 1, "num_micro_batches": 1, "precision": "bf16", **facts}
        return why_no_reference(demo(name, *overrides), **given)

    assert why("supervised", *NO_COLOURS) is None is why("simclr")
    assert "color_jitter" in str(why("supervised"))
    assert "optim.name=lars" in str(why("simclr", *RESNET, "optim.name=lars"))
    assert "method.ema" in str(why("simclr", "method.ema=0.9"))
    assert why("simclr", ranks=2, num_micro_batches=2) == "it does not run on 2 ranks or with accumulation"


def of_recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, overrides=["strategy.micro_batch_size=null", *overrides], shards="none")


def test_operations_of_a_resnet_are_the_published_ones() -> None:
    """4.09 G multiplications an image forward; backward twice as many, but for the pixels' gradient."""
    found = model_flops(of_recipe("supervised/resnet50_in1k"), micro_batch_size=2)
    assert found / 2 == pytest.approx(3 * 2 * 4.09e9, rel=0.02)


def test_operations_of_simclr_are_of_both_views_and_the_head() -> None:
    m, d, depth, tokens, pixels = 2, 768, 12, 197, 196 * 3 * 16 * 16
    block = tokens * (24 * d * d + 4 * tokens * d)
    head = 2 * (d * 4096 + 4096 * 4096 + 4096 * 256)
    wanted = 2 * m * (3 * (depth * block + head) + 2 * pixels * d)  # the patch embedding is frozen
    assert model_flops(of_recipe("simclr/vitb16_in1k"), micro_batch_size=m) == pytest.approx(wanted, rel=2e-3)
    m, resnet = 2, 3 * 2 * 4.09e9
    head = 2 * (2048 * 2048 + 2048 * 128)
    found = model_flops(of_recipe("simclr/resnet50_in1k"), micro_batch_size=m)
    assert found == pytest.approx(2 * m * (resnet + 3 * head), rel=0.02)
