"""Supervised training: its loss and gradient by hand and on every layout, mixed images, scores, frozen backbones,
averaged weights, labels, views, optimiser groups, refusals.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.methods.supervised.augment import erase_
from scaler.methods.supervised.method import Supervised
from scaler.methods.supervised.mixing import make_mixup, mix_
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.batch_norm import GlobalBatchNorm
from scaler.optimizers import build_optimizer, set_hyper
from scaler.recipe import Optim, StrategySettings, load_recipe
from scaler.strategies import strategy_class
from shards.random import keyed_bits
from tests.distributed.helper import run_distributed
from tests.long import only_long

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


DROPPING = {**VIT, "drop_path": 0.3, "group_size": 2, "mixup": 0.8, "cutmix": 1.0, "mix_by": "pair"}


def test_accumulation_changes_nothing() -> None:
    whole = one_step(World(), DROPPING, 1)
    assert_equal([one_step(World(), DROPPING, k) for k in (2, 3, 6)], whole)
    plain = one_step(World(), VIT, 1)
    dropping = one_step(World(), {**VIT, "drop_path": 0.3, "group_size": 2}, 1)
    losses = [float(result[1]["loss"]) for result in (plain, dropping, whole)]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-4, "each must do something"


FINE_TUNING = Optim(name="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.7)
PROBE = Optim(name="sgd", lr=0.05)
RUNS: dict[str, tuple[dict[str, Any], Optim, int]] = {  # settings, optimiser, micro-batches a rank
    "vit": ({**DROPPING, "backbone_lr_scale": 0.3, "ema": 0.9}, FINE_TUNING, 3),
    "probe": ({**VIT, "freeze_backbone": True, "ema": 0.9}, PROBE, 3),
    "cnn": ({"backbone": "test_efficientnet", "ema": 0.9, "group_size": 6, "mixup": 0.5}, FINE_TUNING, 1),
    "cnn_probe": ({"backbone": "test_resnet", "freeze_backbone": True}, PROBE, 2),
}


def several_updates(world: World, name: str, settings: dict[str, Any], optim: Optim, k: int) -> list[list[float]]:
    """Three steps under a strategy: loss, gradient norm, and what `evaluate` finds after each."""
    torch.manual_seed(0)
    method = Supervised(Supervised.Settings(num_classes=CLASSES, **settings), image_size=SIZE, world=world)
    strategy = strategy_class(name)(
        StrategySettings(name=name, precision="fp32"),
        world=world, device=torch.device("cpu"), clip_norm=1.0, deterministic=True,
    )  # fmt: skip
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    size = BATCH // world.size // k
    method.check_layout(num_micro_batches=k, micro_batch_size=size)
    found = []
    for step in range(3):
        hyper = {"lr": optim.lr, "weight_decay": optim.weight_decay, **method.hyper(step, int)}
        set_hyper(strategy.optimizer, hyper)
        total = torch.zeros(())
        for i in range(k):
            start = (world.rank * k + i) * size
            batch = method.augment(make_batch(range(start, start + size)), seed=1, step=step)
            with strategy.accumulate(last=i == k - 1):
                out = strategy("learn", batch, None, hyper)
                strategy.backward(out["loss"] / k)
            total += out["metrics"]["loss"] / k
        result = strategy.step()
        method.after_step(hyper, strategy.lerp_)
        method.eval()
        scores = strategy("evaluate", make_batch(range(BATCH))["views"]["image"][0] / 255, LABELS)
        method.train()
        found.append([float(world.sum_(total) / world.size), result.grad_norm, float(scores["loss"].mean())])
    return found


def all_jobs(world: World, names: list[str]) -> list[Any]:
    gradients = [one_step(world, RESNET, 1), one_step(world, DROPPING, 3)]
    return [gradients, {(name, run): several_updates(world, name, *RUNS[run]) for name in names for run in RUNS}]


@pytest.mark.parametrize("names", [["ddp", "fsdp2"], pytest.param(["zero1", "zero2", "zero3"], marks=only_long)])
def test_ranks_and_strategies_change_nothing(names: list[str]) -> None:
    """Batch norm over all ranks gives timm's own gradients and running statistics of the whole batch; mixed images,
    learning rates by layer, averaged weights and frozen backbones are the same wherever the parameters lie.
    """
    expected = [timm_step(), one_step(World(), DROPPING, 1)]
    assert_equal([one_step(World(), RESNET, 1)], expected[0])
    updates = {run: several_updates(World(), "ddp", *RUNS[run]) for run in RUNS}
    for gradients, found in run_distributed(all_jobs, 2, names):
        for mine, whole in zip(gradients, expected, strict=True):
            assert_equal([mine], whole)
        for (name, run), rows in found.items():
            assert np.array(rows) == pytest.approx(np.array(updates[run]), rel=2e-5), (name, run)


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


# ---------------------------------------------------------------------- mixed images, scores, averages, probes


@examples(max_examples=100, deadline=None)
@given(
    mix_by=st.sampled_from([("group", "batch"), ("pair", "pair"), ("image", "elem")]),
    alphas=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.3, 2.0)]),
    probability=st.sampled_from([1.0, 0.5]),
    share=st.sampled_from([0.5, 0.2]),
    smoothing=st.sampled_from([0.0, 0.1]),
    group_size=st.sampled_from([2, 4, 6, 12]),
    step=st.integers(0, 2**40),
)
def test_mixing_is_timms_in_every_group(mix_by, alphas, probability, share, smoothing, group_size, step) -> None:
    """Images, targets and the loss of each group are those of timm's Mixup with a generator seeded for that group, in
    whatever micro-batches the groups come, and numpy's own generator goes on undisturbed.
    """
    both = {"cutmix_share": share} if all(alphas) else {}
    method = mixing_method(
        mixup=alphas[0], cutmix=alphas[1], mix_by=mix_by[0], mix_probability=probability, group_size=group_size,
        label_smoothing=smoothing, **both,
    )  # fmt: skip
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    whole = method.augment(make_batch(range(BATCH)), seed=3, step=step)
    parts = [
        method.augment(make_batch(range(i, i + group_size)), seed=3, step=step) for i in range(0, BATCH, group_size)
    ]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr, index]
    plain = mixing_method().augment(make_batch(range(BATCH)), seed=3, step=step)
    theirs = Mixup(
        mixup_alpha=alphas[0], cutmix_alpha=alphas[1], prob=probability, switch_prob=share, mode=mix_by[1],
        label_smoothing=smoothing, num_classes=CLASSES,
    )  # fmt: skip
    scores = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    losses = []
    for group, part in enumerate(parts):
        rows = slice(group * group_size, (group + 1) * group_size)
        np.random.seed(int(keyed_bits("mixup", 3, step, group)) >> 32)
        images, targets = theirs(plain["images"][rows].clone(), LABELS[rows])
        torch.testing.assert_close(part["images"], images, rtol=0, atol=0)
        torch.testing.assert_close(whole["images"][rows], images, rtol=0, atol=0)
        assert whole["targets"][rows].equal(part["targets"])
        losses.append(SoftTargetCrossEntropy()(scores[rows], targets.double()))
    loss = F.cross_entropy(scores, whole["targets"].double(), label_smoothing=smoothing)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)  # timm's targets are fp32


@functools.cache
def mixing_method(**values: Any) -> Supervised:
    """A method that is not run: only its augmentation is."""
    return make_method(**{**VIT, "depth": 1}, **values)


def test_mixed_images_are_drawn_anew_and_count_by_their_larger_part() -> None:
    method = mixing_method(mixup=1.0, group_size=2)
    first, again, later, seeded = (
        method.augment(make_batch(range(BATCH)), seed=seed, step=step)["targets"]
        for seed, step in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first.equal(again) and not first.equal(later) and not first.equal(seeded)
    assert len(first.max(dim=1).values.unique()) == BATCH // 2, "every group draws its own share"

    batch = augmented(method)
    out = method("learn", batch, None, {})
    with torch.no_grad():
        scores = method.head(method.features(batch["images"]))
    target = batch["targets"].double()
    assert out["loss"].item() == pytest.approx(F.cross_entropy(scores, target, label_smoothing=0.1).item(), rel=1e-12)
    hits = (scores.argmax(dim=1) == target.argmax(dim=1)).double().mean()
    assert float(out["metrics"]["accuracy"]) == pytest.approx(float(hits)) and 0 < hits < 1


def test_scores_against_scikit_learns() -> None:
    for classes in (CLASSES, 9):
        method = make_method(**VIT, num_classes=classes).eval()
        images = torch.randn(40, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(40) * 7 % classes
        with torch.no_grad():
            found = method("evaluate", images, labels)
            p = method.head(method.features(images)).softmax(dim=1).numpy()
        assert all(value.shape == (40,) for value in found.values())
        names = np.arange(classes)
        assert found["top1"].mean().item() == top_k_accuracy_score(labels, p, k=1, labels=names)
        assert found["loss"].mean().item() == pytest.approx(log_loss(labels, p, labels=names), rel=1e-9)
        if classes > 5:
            assert found["top5"].mean().item() == top_k_accuracy_score(labels, p, k=5, labels=names)
            assert 0 < found["top1"].mean() < found["top5"].mean() < 1
        else:
            assert found.keys() == {"top1", "loss"}, "the five best of five classes are always right"


def lerp_(targets: Any, sources: Any, weight: float) -> None:
    torch._foreach_lerp_(targets, sources, weight)


def test_the_average_follows_and_is_what_is_evaluated() -> None:
    """Against the recursion written out, for parameters and running statistics, through a state dict and back."""
    method = make_method(backbone="test_resnet", ema=0.6)
    assert method.validates and method.average is not None
    live = {"backbone": method.backbone, "head": method.head}
    expected = {name: value.clone() for name, value in method.average.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    momenta = []
    for step in range(8):
        method("learn", augmented(method), None, {})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        hyper = method.hyper(step, int)
        method.after_step(hyper, lerp_)
        m = min(0.6, (1 + step) / (10 + step))
        momenta.append(hyper["momentum"])
        assert hyper["momentum"] == m
        for key, module in live.items():
            for name, value in module.state_dict().items():
                old = expected[f"{key}.{name}"]
                expected[f"{key}.{name}"] = m * old + (1 - m) * value if value.is_floating_point() else value.clone()
    assert momenta[0] == 0.1 and momenta[-1] < 0.6, "warm-up"
    assert method.hyper(99, int)["momentum"] == 0.6
    torch.testing.assert_close(dict(method.average.state_dict()), expected, rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in method.average.parameters()) and not method.train().average["head"].training

    fresh = make_method(backbone="test_resnet", ema=0.6)
    fresh.load_state_dict(method.state_dict())
    images = augmented(method)["images"]
    averaged = make_method(backbone="test_resnet")
    averaged.load_state_dict(expected)
    averaged.eval()
    for model in (method.eval(), fresh.eval()):
        torch.testing.assert_close(model.features(images), averaged.features(images), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            model.evaluate(images, LABELS)["loss"], averaged.evaluate(images, LABELS)["loss"], rtol=1e-9, atol=1e-12
        )
        assert not torch.allclose(model.features(images), model.backbone.pooled(images), rtol=1e-3)
    assert len(method.blocks()) == 2 * len(averaged.blocks()) and method.blocks()[: len(averaged.blocks())] == (
        method.backbone.blocks()
    ), "the trained ones first: they are what activation checkpointing counts"


def test_a_frozen_backbone_keeps_its_weights_and_its_statistics() -> None:
    """The classifier's gradient is that of a linear probe on features of evaluation mode; accumulation is allowed."""
    method = make_method(**RESNET, freeze_backbone=True, ema=0.9)
    method.check_layout(num_micro_batches=3, micro_batch_size=4)
    before = copy.deepcopy(method.backbone.state_dict())
    names = [name for group in method.parameter_groups(PROBE) for name in group["names"]]
    assert names == ["head.weight", "head.bias"]
    for module in method.train().modules():
        assert not (isinstance(module, GlobalBatchNorm) and module.training)
    batch = augmented(method)
    method("learn", batch, None, {})["loss"].backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    torch.testing.assert_close(dict(method.backbone.state_dict()), dict(before), rtol=0, atol=0)

    probe = copy.deepcopy(method.head)
    probe.zero_grad()
    F.cross_entropy(probe(method.eval().features(batch["images"])), LABELS, label_smoothing=0.1).backward()
    torch.testing.assert_close(method.head.weight.grad, probe.weight.grad, rtol=1e-12, atol=1e-14)
    assert method.average is not None and list(method.average) == ["head"], "a frozen backbone is its own average"
    assert any("freeze_backbone" in line for line in method.advice())
    assert not make_method(**RESNET).advice()


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

    some = ({"grayscale_probability": 0.5}, {"erase_probability": 0.5})
    for settings in ({"color_jitter": 0.4}, {"hue": 0.1}, {"erase_probability": 1.0}, *some):
        method = make_method(**VIT, **settings)
        images = method.augment(make_batch(range(BATCH)), seed=1, step=0)["images"]
        changed = (images != plain["images"]).flatten(1).any(dim=1)
        assert (0 < changed.sum() < BATCH) if settings in some else changed.all()
        if settings == {"erase_probability": 1.0}:
            area = (images == 0).all(dim=1).double().mean(dim=(1, 2))
            assert (images[images != 0] == plain["images"][images != 0]).all() and (area > 0).all() and area.max() < 0.4
        part = method.augment(make_batch(range(4, 8)), seed=1, step=3)["images"]
        torch.testing.assert_close(part, images[4:8])  # keyed by sample: neither layout nor step counts
        assert not images.equal(method.augment(make_batch(range(BATCH)), seed=2, step=0)["images"])


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_erasing_is_timms_of_every_image(size: int, probability: float) -> None:
    m = 200
    ids, epochs = torch.arange(m) * 31, torch.arange(m) % 3
    images = torch.randn(m, 3, size, size + 7, generator=torch.Generator().manual_seed(0))
    erased = images.clone()
    before = random.getstate()
    erase_(erased, {"ids": ids, "epochs": epochs}, probability=probability, seed=4)
    assert random.getstate() == before
    timms, expected = RandomErasing(probability, mode="const", device="cpu"), images.clone()
    for image, bits in zip(expected, keyed_bits("erase", 4, epochs.numpy(), ids.numpy()), strict=True):
        random.seed(int(bits))
        timms(image)
    random.setstate(before)
    assert torch.equal(erased, expected) and not torch.equal(erased, images)


@pytest.mark.parametrize("mix_by", ["group", "pair", "image"])
def test_images_of_any_memory_and_precision_are_mixed_alike(mix_by: str) -> None:
    mixup = make_mixup(SupervisedSettings(num_classes=CLASSES, mixup=1.0, cutmix=1.0, mix_by=mix_by, group_size=4))
    assert mixup is not None
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    lying = images.bfloat16().contiguous(memory_format=torch.channels_last)
    where = {"positions": torch.arange(BATCH), "group_size": 4, "seed": 0, "step": 5}
    wanted = mix_(mixup, images, LABELS, **where)
    assert mix_(mixup, lying, LABELS, **where).equal(wanted)
    torch.testing.assert_close(lying.float(), images, rtol=2**-7, atol=2**-7)  # rounded twice
    assert lying.is_contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "swin_tiny_patch4_window7_224", "test_efficientnet"])
def test_layer_decay_is_timms(name: str) -> None:
    """The same learning rates as timm gives the same model with its own classifier; the head has the full one."""
    size = 224 if name.startswith("swin") else 32
    with torch.device("meta"):
        method = Supervised(
            Supervised.Settings(backbone=name, num_classes=CLASSES, backbone_lr_scale=0.5),
            image_size=size,
            world=World(),
        )
        model: Any = timm.create_model(name, num_classes=CLASSES)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    classifier = f"{model.pretrained_cfg['classifier']}."
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    expected = {
        key.replace(classifier, "head.") if key.startswith(classifier) else f"backbone.model.{key}": scale
        if key.startswith(classifier) else 0.5 * scale
        for key, scale in theirs.items()
    }  # fmt: skip
    found = {
        key: group["lr_scale"]
        for group in method.parameter_groups(Optim(lr=1.0, layer_decay=0.7))
        for key in group["names"]
    }
    assert found == pytest.approx(expected) and found["head.weight"] == 1.0 and len(set(found.values())) > 4


def test_layer_decay_of_a_vit_is_beits() -> None:
    """Stem decay^(depth + 1), block i decay^(depth - i), final norm and head 1; two rates without it."""
    method = make_method(**VIT, backbone_lr_scale=0.1)
    optim = Optim(lr=1.0, layer_decay=0.5, patch_embed_lr_scale=0.2)
    found = {key: group["lr_scale"] for group in method.parameter_groups(optim) for key in group["names"]}
    for key, scale in found.items():
        expected = 1.0 if key.startswith("head.") else 0.1
        if "blocks." in key:
            expected *= 0.5 ** (2 - int(key.split(".")[2]))
        elif key in ("backbone.cls_token", "backbone.pos_embed") or "patch_embed" in key:
            expected *= 0.5**3 * (0.2 if "patch_embed" in key else 1.0)
        assert scale == pytest.approx(expected), key
    by_rate = {g["lr_scale"]: g for g in method.parameter_groups(Optim(lr=1.0)) if g["weight_decay_scale"]}
    assert set(by_rate) == {0.1, 1.0} and by_rate[1.0]["names"] == ["head.weight"]


@pytest.mark.parametrize(
    ("settings", "optim", "message"),
    [
        ({"mix_by": "pair"}, {}, "mix_by=pair has no effect without mixup or cutmix"),
        ({"mixup": 0.8, "cutmix_share": 0.9}, {}, "cutmix_share=0.9 has no effect unless mixup and cutmix are both on"),
        ({"cutmix": 1.0, "group_size": 3}, {}, "group_size 3 must be even"),
        ({"freeze_backbone": True, "drop_path": 0.1}, {}, "drop_path=0.1 has no effect with freeze_backbone"),
        ({"freeze_backbone": True, "backbone_lr_scale": 0.1}, {}, "backbone_lr_scale=0.1 has no effect with freeze"),
        ({"freeze_backbone": True}, {"layer_decay": 0.9}, "optim.layer_decay=0.9 has no effect: .* no such trained"),
        (
            RESNET,
            {"patch_embed_lr_scale": 0.2},
            "optim.patch_embed_lr_scale=0.2 has no effect: this resnet18 has no such",
        ),
    ],
)
def test_settings_that_change_nothing_are_refused(settings: Any, optim: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(**{**VIT, **settings} if settings is not RESNET else RESNET).parameter_groups(
            Optim(lr=1.0, **optim)
        )


def test_layouts_that_would_change_the_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resnet18 has batch norm.*strategy.micro_batch_size to 12"):
        make_method(**RESNET).check_layout(num_micro_batches=3, micro_batch_size=4)
    with pytest.raises(ValueError, match="micro-batch of 6 images does not hold whole groups of 4"):
        make_method(**VIT, drop_path=0.1, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)
    with pytest.raises(ValueError, match="whole groups of 4 images for drop path and mixing images"):
        make_method(**VIT, drop_path=0.1, mixup=0.2, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)
    make_method(**VIT, group_size=4).check_layout(num_micro_batches=2, micro_batch_size=6)


def test_settings_shape_the_model() -> None:
    method = make_method(**RESNET, small_stem=True, num_classes=7)
    assert method.head.weight.shape == (7, 512)
    assert method.features(torch.zeros(2, 3, SIZE, SIZE).double()).shape == (2, 512)
    assert method.backbone.model.conv1.stride == (1, 1)  # type: ignore[union-attr]
    assert len(make_method(**{**VIT, "depth": 3}).blocks()) == 3
    vit: Any = make_method(**VIT, layer_scale=0.01, registers=3).backbone  # as DINOv2 trains them
    assert vit.reg_token.shape == (1, 3, 24) and vit.blocks[0].ls1.gamma[0].item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"method\.num_classes is missing and has no default"):
        load_recipe("dinov2/demo", overrides=["method={name: supervised}"])


def test_the_recipes() -> None:
    recipe = load_recipe("supervised/resnet50_in1k")
    optim = recipe.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.scaled_lr(256)) == ("sgd", 0.9, 1e-4, 0.1)
    assert (recipe.schedule.total, recipe.data.image_size, recipe.method.num_classes) == ("90 epochs", 224, 1000)
    steps = load_recipe(
        "supervised/resnet50_in1k", overrides=["schedule.shape=step", "schedule.milestones=[30 epochs, 60 epochs]"]
    ).schedule
    assert (steps.shape, steps.milestones, steps.factor) == ("step", ("30 epochs", "60 epochs"), 0.1)
    vit = load_recipe("supervised/vitb16_finetune")
    assert (vit.method.mixup, vit.method.cutmix, vit.method.erase_probability, vit.method.drop_path) == (
        0.8,
        1,
        0.25,
        0.1,
    )
    assert (vit.optim.layer_decay, vit.optim.scaled_lr(1024), vit.optim.weight_decay) == (0.65, 2e-3, 0.05)
    article = load_recipe("supervised/resnet50_finetune")
    assert (article.optim.lr, article.optim.lr * article.method.backbone_lr_scale) == pytest.approx((1e-3, 1e-5))
    overrides = ["method.freeze_backbone=true", "method.backbone_lr_scale=1.0", "method.ema=null"]
    probe = load_recipe("supervised/resnet50_finetune", overrides=overrides)
    shallow = load_recipe("supervised/vitb16_finetune", overrides=["method.depth=1"])
    for recipe in (article, probe, shallow, load_recipe("supervised/demo")):
        method = Supervised(recipe.method, image_size=recipe.data.image_size, world=World())
        micro = recipe.strategy.micro_batch_size or recipe.data.global_batch_size
        method.check_layout(num_micro_batches=recipe.data.global_batch_size // micro, micro_batch_size=micro)
        assert method.parameter_groups(recipe.optim)
