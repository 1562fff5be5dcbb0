"""Gram anchoring: its loss by definition, what its teacher sees, when it takes whose weights, and every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler.methods.dinov2.gram import gram_loss, to_grid
from scaler.methods.dinov2.method import DINOv2
from scaler.nn.weights import Weights
from tests.scaler.methods.dinov2.test_method import HYPER, assert_equal_steps, run_step
from tests.scaler.methods.dinov2.tiny import loader_batch, micro_batches, tiny_method

GRAM = {"gram_weight": 2.0, "gram_start": "2 steps"}
NOW = {**HYPER, "gram_weight": 2.0, "gram_follows": 0.0}


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Patch by patch, in Python's own numbers."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), [math.hypot(*v) for v in (a, b)]
        return dot / norms[0] / norms[1]

    total, count = 0.0, 0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                total += (cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2
                count += 1
    return total / count


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_the_loss_is_its_definition_in_any_chunks(n: int, p: int, d: int, e: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, p, d, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(n, p, e, generator=generator, dtype=torch.float64)
    loss = gram_loss(student, teacher)
    assert float(loss.detach()) == pytest.approx(naive(student, teacher), rel=1e-10, abs=1e-12)
    assert float(gram_loss(student.detach().float(), teacher.float())) == pytest.approx(
        float(loss.detach()), rel=1e-5, abs=1e-6
    )
    (expected,) = torch.autograd.grad(loss, student)
    (chunked,) = torch.autograd.grad(gram_loss(student, teacher, similarities=2 * p * p), student)
    torch.testing.assert_close(chunked, expected, rtol=1e-10, atol=1e-12)


def test_features_of_larger_crops_are_brought_to_the_students_grid() -> None:
    ramp = torch.arange(8.0).repeat(8, 1)  # a feature that grows from left to right
    fine = torch.stack([ramp, ramp.T], dim=-1).view(1, 64, 2)
    coarse = to_grid(fine, old=(8, 8), new=(4, 4)).view(4, 4, 2)
    torch.testing.assert_close(coarse[1:3, 1:3, 0], torch.tensor([[2.5, 4.5], [2.5, 4.5]]))
    torch.testing.assert_close(coarse[..., 1], coarse[..., 0].T)
    assert to_grid(fine, old=(8, 8), new=(8, 8)) is fine


@pytest.mark.parametrize("factor", [1, 2])
def test_the_methods_term_is_the_definition_on_undistorted_crops(factor: int) -> None:
    method = tiny_method(**GRAM, gram_size_factor=factor, drop_path=0.0).double()
    with torch.no_grad():
        for parameter in method.gram_teacher.parameters():
            parameter.mul_(1.1)
    (batch,) = micro_batches(method, [0, 16], double=True)
    views = loader_batch(method, rows=slice(0, 16))["views"]
    names = ["gram_1", "gram_2"] if factor == 2 else ["global_1", "global_2"]
    pixels = torch.cat([views[name][0] for name in names])
    assert torch.equal(batch["gram"], pixels) and pixels.shape[-1] == 32 * factor
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in method.normalization)
    patches = method.gram_teacher([(pixels / 255.0 - mean) / std])[0].patches
    anchor = to_grid(patches, old=(4 * factor, 4 * factor), new=(4, 4)).detach()
    student = method.student.backbone([batch["crops"][0]], masks=[batch["masks"]])[0].patches
    (target,) = method.combine([method.observe(batch, NOW)], NOW)
    metrics = method.learn(batch, target, NOW)["metrics"]
    assert float(metrics["loss/gram"]) == pytest.approx(naive(student, anchor), rel=1e-6)
    terms = metrics["loss/dino"] + metrics["loss/ibot"] + 0.1 * metrics["loss/koleo"] + 2 * metrics["loss/gram"]
    torch.testing.assert_close(metrics["loss"], terms)
    off = method.learn(batch, target, {**NOW, "gram_weight": 0.0})["metrics"]
    assert off["loss/gram"] == 0 and float(off["loss"]) == pytest.approx(float(terms - 2 * metrics["loss/gram"]))


def test_the_larger_views_leave_the_others_as_they_are() -> None:
    plain, gram = (DINOv2.views_at(tiny_method(**c), 32) for c in ({}, {**GRAM, "gram_size_factor": 2}))
    assert gram[: len(plain)] == plain
    assert [(v.name, v.drawn_as, v.size, v.scale, v.flip) for v in gram[len(plain) :]] == [
        (f"gram_{i}", f"global_{i}", 64, (0.32, 1.0), 0.5) for i in (1, 2)
    ]


@pytest.mark.parametrize("factor", [1, 2])
def test_micro_batches_give_the_whole_batchs_gradients(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.scaler.methods.dinov2.test_method.HYPER", NOW)
    changes = {**GRAM, "gram_size_factor": factor}
    expected = run_step(tiny_method(**changes).double(), [0, 16])
    assert expected["metrics"]["loss/gram"] > 0
    assert not any(name.startswith("gram_teacher") for name in expected["gradients"])
    assert_equal_steps(run_step(tiny_method(**changes).double(), [0, 4, 8, 12, 16]), expected, tolerance=1e-9)


def lerp_(targets: Any, sources: Any, weight: float) -> None:
    torch._foreach_lerp_(targets, sources, weight)


def test_the_gram_teacher_is_the_teacher_of_its_start_until_it_is_taken_anew() -> None:
    method = tiny_method(gram_weight=2.0, gram_start="3 steps", gram_refresh="4 steps")
    lengths = {"total": 20, "5 steps": 5, "2 steps": 2, "3 steps": 3, "4 steps": 4}
    kept = {}  # after how many updates the gram teacher had the teacher's weights
    for step in range(12):
        hyper = method.hyper(step, lengths.__getitem__)
        assert hyper["gram_weight"] == (2.0 if step >= 3 else 0.0)
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        method.after_step({**hyper, "momentum": 0.5}, lerp_)
        same = zip(method.gram_teacher.parameters(), method.teacher.backbone.parameters(), strict=True)
        kept[step + 1] = all(torch.equal(a, b) for a, b in same)
    assert [updates for updates, same in kept.items() if same] == [1, 2, 3, 7, 11]


def test_it_is_neither_trained_nor_put_in_training_mode_and_is_saved() -> None:
    method = tiny_method(**GRAM)
    assert not any(p.requires_grad for p in method.gram_teacher.parameters())
    assert method.student.training and not method.gram_teacher.training
    assert any(name.startswith("gram_teacher.") for name in method.state_dict())
    assert len(method.blocks()) == 6 and len(tiny_method().blocks()) == 4


def test_weights_of_an_earlier_teacher() -> None:
    earlier = tiny_method(seed=7).teacher.backbone
    tensors = {f"teacher.backbone.{name}": value for name, value in earlier.state_dict().items()}
    method = tiny_method(gram_weight=1.5, gram_teacher="earlier.safetensors")
    (line,) = method.load_weights(lambda source, backbone: Weights(source, tensors))
    assert line.startswith("method.gram_teacher: ") and "earlier.safetensors" in line
    for name, value in method.gram_teacher.state_dict().items():
        assert torch.equal(value, tensors[f"teacher.backbone.{name}"])
    assert not torch.equal(method.teacher.backbone.norm.weight, method.gram_teacher.norm.weight)
    hyper = method.hyper(0, {"total": 20, "0 steps": 0, "5 steps": 5, "2 steps": 2}.__getitem__)
    assert hyper["gram_weight"] == 1.5 and hyper["gram_follows"] == 0.0
    tensors["teacher.backbone.cls_token"] = torch.full_like(tensors["teacher.backbone.cls_token"], 3.0)
    own = tiny_method(gram_weight=2.0, weights="x")
    own.load_weights(lambda source, backbone: Weights(source, tensors))
    assert (own.gram_teacher.cls_token == 3.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gram_size_factor": 2, "gram_start": "5 steps"}, "gram_start, gram_size_factor: without effect"),
        ({"gram_weight": 2.0}, "the gram teacher would be the random initial one"),
        ({"gram_weight": 2.0, "gram_teacher": "x", "gram_refresh": "5 steps"}, "gram_refresh takes this run's teacher"),
        ({"gram_weight": 2.0, "gram_start": "soon"}, "no duration"),
        ({**GRAM, "gram_refresh": "0 steps"}, "gram_refresh 0 steps is no time"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_method(**changes)


def test_bf16_is_close_to_fp32() -> None:
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        method = tiny_method(**GRAM, gram_size_factor=2, drop_path=0.0)
        (batch,) = micro_batches(method, [0, 16])
        with torch.autocast("cpu", dtype=precision, enabled=precision is torch.bfloat16):
            (target,) = method("combine", [method("observe", batch, NOW)], NOW)
            losses.append(method("learn", batch, target, NOW)["metrics"]["loss/gram"])
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0.0)
