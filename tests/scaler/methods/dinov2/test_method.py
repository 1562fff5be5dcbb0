"""The whole method: its losses against lightly's on the same network outputs, layouts, ranks, teacher, schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules.center import Center
from torch import Tensor
from torch.nn.functional import linear

from scaler.collectives import World
from scaler.methods.dinov2.method import DINOv2, Observation
from tests.distributed.helper import run_distributed
from tests.scaler.methods.dinov2.test_sinkhorn import naive
from tests.scaler.methods.dinov2.tiny import micro_batches, tiny_method

HYPER = {"momentum": 0.9, "teacher_temperature": 0.0625, "last_layer_lr_scale": 1.0}


def run_step(method: DINOv2, cuts: list[int], *, double: bool = True, step: int = 3) -> dict[str, Any]:
    """One step over local micro-batches: mean metrics, gradients by name, and centres where there are any."""
    batches = micro_batches(method, cuts, step=step, double=double)
    with torch.no_grad():
        targets = method("combine", [method("observe", batch, HYPER) for batch in batches], HYPER)
    metrics = []
    for batch, target in zip(batches, targets, strict=True):
        out = method("learn", batch, target, HYPER)
        (out["loss"] / len(batches)).backward()
        metrics.append(out["metrics"])
    return {
        "metrics": {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]},
        "gradients": {name: p.grad for name, p in method.named_parameters() if p.grad is not None},
        "buffers": dict(method.named_buffers()),
    }


def assert_equal_steps(actual: dict[str, Any], expected: dict[str, Any], *, tolerance: float) -> None:
    for name, value in expected["metrics"].items():
        torch.testing.assert_close(actual["metrics"][name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert set(actual["gradients"]) == set(expected["gradients"])
    pairs = [(actual["gradients"][name], value) for name, value in expected["gradients"].items()]
    difference = torch.stack([(a - e).square().sum() for a, e in pairs]).sum().sqrt()
    assert float(difference / torch.stack([e.square().sum() for _, e in pairs]).sum().sqrt()) < tolerance
    for name, value in expected["buffers"].items():
        torch.testing.assert_close(actual["buffers"][name], value, rtol=tolerance, atol=tolerance)


VARIANTS = [
    {"centering": "sinkhorn"},
    {"centering": "softmax"},
    {"separate_heads": True, "registers": 2},
    {"num_local_crops": 0, "drop_path": 0.0},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_micro_batches_give_the_whole_batchs_loss_and_gradients(changes: dict[str, Any]) -> None:
    expected = run_step(tiny_method(**changes).double(), [0, 16])
    for cuts in ([0, 4, 8, 12, 16], [0, 8, 16]):
        actual = run_step(tiny_method(**changes).double(), cuts)
        assert_equal_steps(actual, expected, tolerance=1e-9)


def rank_step(world: World, changes: dict[str, Any]) -> dict[str, Any]:
    start, per_rank = 16 // world.size * world.rank, 16 // world.size
    method = tiny_method(world, **changes).double()
    result = run_step(method, list(range(start, start + per_rank + 1, 4)))
    for value in (*result["metrics"].values(), *result["gradients"].values()):
        world.sum_(value).div_(world.size)  # what the strategies do
    return result


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_ranks_give_the_whole_batchs_loss_and_gradients(centering: str) -> None:
    changes = {"centering": centering}
    expected = run_step(tiny_method(**changes).double(), [0, 16])
    for actual in run_distributed(rank_step, 2, changes):
        assert_equal_steps(actual, expected, tolerance=1e-9)


@pytest.mark.parametrize("changes", VARIANTS)
def test_tiles_change_nothing(changes: dict[str, Any]) -> None:
    expected = run_step(tiny_method(**changes).double(), [0, 16])
    tiled = tiny_method(**changes).double()
    tiled.tile_elements = 40 * 9  # an image or a few tokens at a time
    assert_equal_steps(run_step(tiled, [0, 16]), expected, tolerance=1e-9)


def outputs(method: DINOv2, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student scores [2 + L, m, K], masked student scores [T, K], the same of the teacher, and student features."""
    m = len(batch["crops"][0]) // 2
    student, teacher = method.student, method.teacher
    views = [v for k, crops in enumerate(batch["crops"]) for v in (
        o.cls for o in [student.backbone([crops], masks=[batch["masks"] if k == 0 else None])[0]]
    )]  # fmt: skip
    scores = torch.cat([student.dino_head(v).view(-1, m, method.settings.num_prototypes) for v in views])
    masked = student.backbone([batch["crops"][0]], masks=[batch["masks"]])[0].patches[batch["masks"]]
    plain = teacher.backbone([batch["crops"][0]])[0]
    return (
        scores,
        student.patch_head(masked),
        teacher.dino_head(plain.cls).view(2, m, -1),
        teacher.patch_head(plain.patches[batch["masks"]]),
        views[0].view(2, m, -1),
    )


@pytest.mark.parametrize("separate", [False, True])
def test_terms_equal_lightlys_on_the_same_outputs(separate: bool) -> None:
    method = tiny_method(centering="softmax", drop_path=0.0, separate_heads=separate, group_size=16)
    actual = run_step(method, [0, 16], double=False)
    (batch,) = micro_batches(method, [0, 16])
    student, masked, teacher, teacher_masked, features = outputs(method, batch)
    dino = DINOLoss(output_dim=40, student_temp=0.1)(list(teacher), list(student), teacher_temp=0.0625)
    ibot_reference = IBOTPatchLoss(output_dim=40, student_temp=0.1)
    ibot = ibot_reference(teacher_masked, masked, batch["masks"].view(-1, 4, 4), teacher_temp=0.0625)
    koleo = KoLeoLoss()(features[0]) + KoLeoLoss()(features[1])
    for name, value in (("dino", dino), ("ibot", ibot), ("koleo", koleo)):
        torch.testing.assert_close(actual["metrics"][f"loss/{name}"], value.detach(), rtol=1e-5, atol=1e-6)
    total = (dino + ibot + 0.1 * koleo).detach()
    torch.testing.assert_close(actual["metrics"]["loss"], total, rtol=1e-5, atol=1e-6)
    # the centre after the step is a tenth of the mean score
    torch.testing.assert_close(method.cls_center, 0.1 * teacher.mean(dim=(0, 1)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.patch_center, 0.1 * teacher_masked.mean(dim=0), rtol=1e-4, atol=1e-6)
    # and is applied from the next step on
    shift = -method.cls_center / 0.0625
    target = method.combine([method.observe(batch, HYPER)], HYPER)[0]
    torch.testing.assert_close(target.cls_shift, shift.detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_centres_are_lightlys_over_many_steps(dtype: torch.dtype, tolerance: float) -> None:
    """The centre moves by the mean score of all micro-batches, and is applied one step later."""
    method = tiny_method(centering="softmax").to(dtype)
    head, reference = method.teacher.dino_head, Center(size=(1, 40), momentum=0.9).to(dtype)
    for seed in range(100):
        torch.manual_seed(seed)
        parts = [torch.randn(n, 16, dtype=dtype) for n in (1 + seed % 7, 4)]
        target = method.combine([Observation(z, z[:0]) for z in parts], HYPER)[0]
        torch.testing.assert_close(target.cls_shift * -0.0625, reference.value[0], rtol=tolerance, atol=tolerance)
        reference.update(head.scores(torch.cat(parts)))
        torch.testing.assert_close(method.cls_center, reference.value[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(method.patch_center, torch.zeros(40, dtype=dtype)), "without tokens it stays"


def test_targets_are_the_whole_matrixs_sinkhorn_and_metrics_say_what_they_should() -> None:
    method = tiny_method(drop_path=0.0).double()
    (batch,) = micro_batches(method, [0, 16], double=True)
    student, _, teacher, _, features = (o.detach() for o in outputs(method, batch))
    q = naive(teacher.flatten(0, 1), 0.0625, 3).view(2, 16, -1)
    target = method.combine([method.observe(batch, HYPER)], HYPER)[0]
    z = target.observation.cls
    mine = (linear(z, method.teacher.dino_head.prototypes()) / 0.0625 + target.cls_shift).softmax(dim=-1)
    torch.testing.assert_close(mine.view(2, 16, -1), q, rtol=1e-8, atol=1e-12)
    expected = run_step(tiny_method(drop_path=0.0).double(), [0, 16])["metrics"]
    assert float(expected["prototype_entropy"]) == pytest.approx(
        float(-(q * q.log()).sum(dim=-1).mean() / torch.tensor(40.0).log()), rel=1e-6
    )
    matches = student[:2].argmax(dim=-1) == q.flip(0).argmax(dim=-1)
    assert float(expected["agreement"]) == pytest.approx(float(matches.double().mean()))
    x = torch.nn.functional.normalize(features, dim=-1).view(2, 4, 4, -1)
    assert float(expected["embedding_std"]) == pytest.approx(float(x.std(dim=2, unbiased=False).mean() * 24**0.5))
    terms = {f"loss/{term}" for term in ("dino", "ibot", "koleo")}
    assert set(expected) == {"loss", "embedding_std", "prototype_entropy", "agreement"} | terms


def test_a_batch_without_masks_still_reaches_every_parameter() -> None:
    for changes in ({}, {"separate_heads": True}):
        method = tiny_method(mask_probability=0.0, **changes)
        result = run_step(method, [0, 8, 16], double=False)
        assert set(result["gradients"]) == {name for name, p in method.named_parameters() if p.requires_grad}
        assert result["metrics"]["loss/ibot"] == 0
        assert all(g.isfinite().all() for g in result["gradients"].values())


def test_the_teacher_starts_as_a_copy_stays_in_evaluation_and_follows() -> None:
    torch.manual_seed(0)
    method = DINOv2(tiny_method().settings, image_size=32, world=World()).train()
    student, teacher = dict(method.student.named_parameters()), dict(method.teacher.named_parameters())
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    assert not any(value.requires_grad for value in teacher.values())
    assert method.student.training and not any(module.training for module in method.teacher.modules())
    with torch.no_grad():
        for value in student.values():
            value.add_(torch.randn_like(value))
    before = {name: value.clone() for name, value in teacher.items()}
    method.after_step(
        {"momentum": 0.9}, lambda targets, sources, weight: torch._foreach_lerp_(targets, sources, weight)
    )
    for name, value in teacher.items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student[name].detach())
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(method.features(images), method.teacher.backbone([images])[0].cls)
    assert method.blocks() == method.student.backbone.blocks() + method.teacher.backbone.blocks()


def test_schedules_against_a_table_by_hand() -> None:
    method = tiny_method(teacher_temperature_warmup="30 epochs", freeze_last_layer="1 epochs")
    lengths = {"total": 125000, "30 epochs": 37500, "1 epochs": 1250}
    table = {  # step: momentum, teacher temperature, scale of the last layer's learning rate
        0: (0.992, 0.04, 0.0),
        1249: (0.992 + 0.008 * 2.463046e-4, 0.04 + 0.03 * 1249 / 37499, 0.0),
        1250: (0.992 + 0.008 * 2.466991e-4, 0.04 + 0.03 * 1250 / 37499, 1.0),
        37499: (0.992 + 0.008 * 0.2060972, 0.07, 1.0),
        62500: (0.996, 0.07, 1.0),
        124999: (1.0, 0.07, 1.0),
    }
    for step, (momentum, temperature, scale) in table.items():
        hyper = method.hyper(step, lengths.__getitem__)
        assert hyper["momentum"] == pytest.approx(momentum, abs=1e-8)
        assert hyper["teacher_temperature"] == pytest.approx(temperature, rel=1e-9)
        assert hyper["last_layer_lr_scale"] == scale


@pytest.mark.parametrize("changes", VARIANTS[:3])
def test_bf16_is_close_to_fp32(changes: dict[str, Any]) -> None:
    expected = run_step(tiny_method(**changes), [0, 16], double=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_step(tiny_method(**changes), [0, 16], double=False)
    for name in ("loss", "loss/dino", "loss/ibot"):
        assert actual["metrics"][name].dtype == torch.float32
        torch.testing.assert_close(actual["metrics"][name], expected["metrics"][name], rtol=0.02, atol=0.0)
    flat = [torch.cat([g.flatten() for g in r["gradients"].values()]) for r in (actual, expected)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_wrong_settings_and_layouts_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"micro-batch of 6 images does not hold whole groups of method\.group_size 4"):
        tiny_method().check_layout(num_micro_batches=2, micro_batch_size=6)
    tiny_method().check_layout(num_micro_batches=2, micro_batch_size=8)
    with pytest.raises(ValueError, match="local_size 20 is not a multiple of the patch size 8; take 16"):
        tiny_method(local_size=20)
    with pytest.raises(ValueError, match=r"mask_ratio is \[low, high\], got \[0.5, 0.1\]"):
        tiny_method(mask_ratio=(0.5, 0.1))
    with pytest.raises(ValueError, match="blur_kernel 4 must be odd"):
        tiny_method(blur_kernel=4)
    with pytest.raises(ValueError, match="no duration"):
        tiny_method(freeze_last_layer="one epoch")
    with pytest.raises(ValueError, match="Extra inputs"):
        tiny_method(prototypes=3)
