"""Supervised training: its loss and gradient by hand and on every layout, labels, views, optimiser groups, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.supervised.method import Supervised
from scaler.optimizers import build_optimizer
from scaler.recipe import Optim, load_recipe
from tests.distributed.helper import run_distributed

SIZE, CLASSES, BATCH = 16, 5, 12
VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3,
}  # fmt: skip
RESNET: dict[str, Any] = {"backbone": "resnet18"}
LABELS = torch.arange(BATCH) * 7 % CLASSES


def make_method(world: World | None = None, **settings: Any) -> Supervised:
    """The same initial weights every time, with a head loud enough to tell classes apart; float64."""
    torch.manual_seed(0)
    settings = {"num_classes": CLASSES, **settings}
    method = Supervised(Supervised.Settings(**settings), image_size=SIZE, world=world or World())
    nn.init.normal_(method.head.weight, std=0.5)
    nn.init.normal_(method.head.bias, std=0.5)
    return method.double()


def make_batch(rows: range, labels: Tensor = LABELS) -> Batch:
    """The given rows of one global batch, as the loader gives them."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (1, BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    chosen = torch.tensor(list(rows))
    return {
        "views": {"image": pixels[:, chosen]},
        "ids": 100 + chosen,
        "epochs": chosen % 2,
        "positions": chosen,
        "labels": labels[chosen],
        "global_batch_size": BATCH,
    }


def augmented(method: Supervised, rows: range = range(BATCH)) -> Batch:
    batch = method.augment(make_batch(rows), seed=1, step=0)
    return {**batch, "images": batch["images"].double()}


def one_step(world: World, settings: dict[str, Any], num_micro_batches: int) -> tuple[dict[str, Tensor], ...]:
    """Gradients averaged over micro-batches and ranks, as every strategy does, metrics likewise, and buffers."""
    method = make_method(world, **settings)
    size = BATCH // world.size // num_micro_batches
    first = BATCH // world.size * world.rank
    method.check_layout(num_micro_batches=num_micro_batches, micro_batch_size=size)
    assert not method.observes(num_micro_batches)
    metrics = []
    for start in range(first, first + BATCH // world.size, size):
        out = method("learn", augmented(method, range(start, start + size)), None, {})
        (out["loss"] / num_micro_batches).backward()
        metrics.append(out["metrics"])
    mean = {name: sum(m[name].double() for m in metrics) / len(metrics) for name in metrics[0]}
    grads = {name: world.sum(p.grad) / world.size for name, p in method.named_parameters() if p.grad is not None}
    return grads, {name: world.sum(value) / world.size for name, value in mean.items()}, dict(method.named_buffers())


def assert_equal(results: list[tuple[dict[str, Tensor], ...]], expected: tuple[dict[str, Tensor], ...]) -> None:
    for result in results:
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)  # fp32 statistics would be 1e-3 off


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_the_loss_and_its_gradient_by_hand(smoothing: float) -> None:
    method = make_method(**VIT, label_smoothing=smoothing)
    batch = augmented(method)
    out = method("learn", batch, None, {})
    out["loss"].backward()

    z = method.features(batch["images"]).detach().numpy()
    scores = z @ method.head.weight.detach().numpy().T + method.head.bias.detach().numpy()
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    q = np.full((BATCH, CLASSES), smoothing / CLASSES)
    q[np.arange(BATCH), LABELS.numpy()] += 1 - smoothing
    assert out["loss"].item() == pytest.approx(-(q * np.log(p)).sum() / BATCH, rel=1e-12)
    assert method.head.weight.grad is not None and method.head.bias.grad is not None
    np.testing.assert_allclose(method.head.bias.grad.numpy(), (p - q).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(method.head.weight.grad.numpy(), (p - q).T @ z / BATCH, atol=1e-12)
    hits = float((scores.argmax(axis=1) == LABELS.numpy()).mean())
    assert {name: float(value) for name, value in out["metrics"].items()} == pytest.approx(
        {"loss": out["loss"].item(), "loss/cross_entropy": out["loss"].item(), "accuracy": hits}
    )
    assert 0 < hits < 1, "an accuracy of 0 or 1 would be right by luck"


def timm_step() -> tuple[dict[str, Tensor], ...]:
    """timm's own ResNet-18 with its own classifier and torch's batch norm on the whole batch."""
    method = make_method(**RESNET)
    model = timm.create_model("resnet18", num_classes=CLASSES).double()
    state = {name.removeprefix("backbone.model."): value for name, value in method.state_dict().items()}
    model.load_state_dict({name.replace("head.", "fc."): value for name, value in state.items()})
    scores = model(augmented(method)["images"])
    loss = nn.functional.cross_entropy(scores, LABELS, label_smoothing=0.1)
    loss.backward()

    def ours(name: str) -> str:
        return name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.model.{name}"

    accuracy = (scores.argmax(dim=1) == LABELS).double().mean()
    return (
        {ours(name): p.grad for name, p in model.named_parameters() if p.grad is not None},
        {"loss": loss.detach(), "loss/cross_entropy": loss.detach(), "accuracy": accuracy},
        {ours(name): value for name, value in model.named_buffers()},
    )


DROPPING = {**VIT, "drop_path": 0.3, "group_size": 2}


def test_accumulation_changes_nothing() -> None:
    whole = one_step(World(), DROPPING, 1)
    assert_equal([one_step(World(), DROPPING, k) for k in (2, 3, 6)], whole)
    plain = one_step(World(), VIT, 1)
    assert abs(float(plain[1]["loss"] - whole[1]["loss"])) > 1e-4, "drop path must drop something"


def several_steps(world: World, jobs: list[tuple[dict[str, Any], int]]) -> list[Any]:
    return [one_step(world, *job) for job in jobs]


def test_ranks_change_nothing() -> None:
    """Batch norm over all ranks gives timm's own gradients and running statistics of the whole batch."""
    expected = [timm_step(), one_step(World(), DROPPING, 1)]
    assert_equal([one_step(World(), RESNET, 1)], expected[0])
    results = run_distributed(several_steps, 2, [(RESNET, 1), (DROPPING, 3)])
    for i, whole in enumerate(expected):
        assert_equal([rank[i] for rank in results], whole)


def test_mixed_precision_keeps_the_loss_in_fp32() -> None:
    method = make_method(**VIT).float()
    batch = method.augment(make_batch(range(BATCH)), seed=1, step=0)
    exact = method("learn", batch, None, {})["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method("learn", batch, None, {})["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=2e-2) and loss.item() != exact


@pytest.mark.parametrize(
    ("settings", "optim"),
    [(VIT, Optim(name="adamw", lr=2e-3)), ({"backbone": "test_resnet"}, Optim(name="sgd", lr=0.05))],
)
def test_training_learns_the_labels(settings: dict[str, Any], optim: Optim) -> None:
    method = make_method(**settings).float()
    optimizer = build_optimizer(optim, method.parameter_groups(optim))
    for step in range(30):
        out = method("learn", method.augment(make_batch(range(BATCH)), seed=1, step=step), None, {})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["metrics"]["accuracy"] == 1.0


def test_the_first_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    method = Supervised(Supervised.Settings(**VIT, num_classes=CLASSES), image_size=SIZE, world=World())
    batch = method.augment(make_batch(range(BATCH)), seed=1, step=0)
    assert method("learn", batch, None, {})["loss"].item() == pytest.approx(np.log(CLASSES), rel=0.02)


# ---------------------------------------------------------------------- data


def test_an_image_without_its_class_is_refused() -> None:
    method = make_method(**VIT)
    for label, message in (
        (-1, r"sample 107 has no label \(-1\).*0 … 4.*class folders"),
        (CLASSES, r"sample 107 has label 5, but method.num_classes=5 allows 0 … 4"),
    ):
        labels = LABELS.clone()
        labels[7] = label
        method.augment(make_batch(range(6), labels), seed=1, step=0)
        with pytest.raises(ValueError, match=message):
            method.augment(make_batch(range(6, BATCH), labels), seed=1, step=0)


def test_shards_of_other_classes_are_refused_at_the_start() -> None:
    method = make_method(**VIT)
    for number in (1, CLASSES):
        method.check_classes([f"class_{i}" for i in range(number)])
    with pytest.raises(ValueError, match="the shards have no labels"):
        method.check_classes([])
    with pytest.raises(ValueError, match=r"have 7 classes.*num_classes=5 .*\(class_5\).*method.num_classes=7"):
        method.check_classes([f"class_{i}" for i in range(7)])


def test_the_view_and_its_colours() -> None:
    (view,) = make_method(**VIT, crop_scale=(0.2, 0.9), flip=0.25).views
    assert (view.name, view.size, view.count, view.scale, view.flip) == ("image", SIZE, 1, (0.2, 0.9), 0.25)

    pixels = make_batch(range(BATCH))["views"]["image"][0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in make_method(**VIT).normalization)
    plain = make_method(**VIT).augment(make_batch(range(BATCH)), seed=1, step=0)
    torch.testing.assert_close(plain["images"], (pixels / 255 - mean) / std)
    assert plain["targets"].equal(LABELS) and plain["keep"] is None

    for settings in ({"color_jitter": 0.4}, {"hue": 0.1}, {"grayscale_probability": 0.5}):
        method = make_method(**VIT, **settings)
        images = method.augment(make_batch(range(BATCH)), seed=1, step=0)["images"]
        changed = (images != plain["images"]).flatten(1).any(dim=1)
        assert (0 < changed.sum() < BATCH) if "grayscale_probability" in settings else changed.all()
        part = method.augment(make_batch(range(4, 8)), seed=1, step=3)["images"]
        torch.testing.assert_close(part, images[4:8])  # keyed by sample: neither layout nor step counts
        assert not images.equal(method.augment(make_batch(range(BATCH)), seed=2, step=0)["images"])


# ---------------------------------------------------------------------- optimiser, layout, settings


def test_optimiser_groups_by_hand() -> None:
    method = make_method(**{**VIT, "depth": 1})
    block = "backbone.blocks.0."
    weights = {f"{block}{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    decayed = weights | {"backbone.patch_embed.proj.weight", "head.weight"}
    plain = {name.replace("weight", "bias") for name in decayed}
    plain |= {f"{norm}.{kind}" for norm in (f"{block}norm1", f"{block}norm2", "backbone.norm") for kind in
              ("weight", "bias")} | {"backbone.cls_token", "backbone.pos_embed"}  # fmt: skip
    groups = method.parameter_groups(Optim(lr=1.0))
    assert [set(group["names"]) for group in groups] == [decayed, plain]
    assert [(g["weight_decay_scale"], g["lr_scale"], g["adapt"], g["clip"]) for g in groups] == [
        (1.0, 1.0, True, "model"),
        (0.0, 1.0, False, "model"),
    ]
    named = dict(method.named_parameters())
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))

    convolutions, rest = make_method(**RESNET).parameter_groups(Optim(lr=1.0))
    assert all("conv" in name or "downsample.0" in name or name == "head.weight" for name in convolutions["names"])
    assert all("bn" in name or "downsample.1" in name or name == "head.bias" for name in rest["names"])
    assert (len(convolutions["names"]), len(rest["names"])) == (20 + 1, 2 * 20 + 1)  # 20 convolutions, each with a norm


def test_layouts_that_would_change_the_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resnet18 has batch norm.*strategy.micro_batch_size to 12"):
        make_method(**RESNET).check_layout(num_micro_batches=3, micro_batch_size=4)
    with pytest.raises(ValueError, match="micro-batch of 6 images does not hold whole groups of 4"):
        make_method(**VIT, drop_path=0.1, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)
    make_method(**VIT, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)


def test_settings_shape_the_model() -> None:
    method = make_method(**RESNET, small_stem=True, num_classes=7)
    assert method.head.weight.shape == (7, 512)
    assert method.features(torch.zeros(2, 3, SIZE, SIZE).double()).shape == (2, 512)
    assert method.backbone.model.conv1.stride == (1, 1)  # type: ignore[union-attr]
    assert len(make_method(**{**VIT, "depth": 3}).blocks()) == 3
    with pytest.raises(ValueError, match=r"method\.num_classes is missing and has no default"):
        load_recipe("dinov2/demo", overrides=["method={name: supervised}"])


def test_the_recipes() -> None:
    recipe = load_recipe("supervised/resnet50_in1k")
    optim = recipe.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.scaled_lr(256)) == ("sgd", 0.9, 1e-4, 0.1)
    assert (recipe.schedule.total, recipe.data.image_size, recipe.method.num_classes) == ("90 epochs", 224, 1000)
    for name in ("resnet50_in1k", "demo"):
        recipe = load_recipe(f"supervised/{name}")
        method = Supervised(recipe.method, image_size=recipe.data.image_size, world=World())
        method.check_layout(num_micro_batches=1, micro_batch_size=recipe.data.global_batch_size)
