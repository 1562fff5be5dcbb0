"""DINO, iBOT and KoLeo against loops in float64 and against lightly's losses."""

from __future__ import annotations

import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from torch import Tensor

from scaler.methods.dinov2.loss import dino_loss, ibot_loss, koleo_loss, teacher_probabilities


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def naive_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> float:
    p = softmax([v / temperature for v in student.tolist()])
    return -math.fsum(t * math.log(q) for t, q in zip(teacher.tolist(), p, strict=True))


def probabilities(*shape: int) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).softmax(dim=-1)


@pytest.mark.parametrize("seed", range(20))
def test_dino_equals_the_double_loop(seed: int) -> None:
    torch.manual_seed(seed)
    n, num_local, k = 3, seed % 4, 7
    student = torch.randn(2 + num_local, n, k, dtype=torch.float64)
    teacher = probabilities(2, n, k)
    terms = [
        [
            naive_cross_entropy(student[v, i], teacher[t, i], 0.1)
            for t in range(2)
            for v in range(2 + num_local)
            if v != t
        ]
        for i in range(n)
    ]
    assert len(terms[0]) == 2 + 2 * num_local
    expected = [math.fsum(values) / len(values) for values in terms]
    actual = dino_loss(student[:2], student[2:], teacher, temperature=0.1)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_dino_equals_lightly_with_gradients(dtype: torch.dtype, rtol: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        student = torch.randn(10, 6, 64, dtype=dtype, requires_grad=True)
        scores, center = torch.randn(2, 6, 64, dtype=dtype), 0.1 * torch.randn(64, dtype=dtype)
        reference = DINOLoss(output_dim=64, teacher_temp=0.05, student_temp=0.1)
        reference.center = center[None, None].clone()
        # lightly keeps the temperature as an fp32 tensor; 0.0625 is exact in both
        expected = reference(list(scores), list(student), teacher_temp=0.0625)
        (expected_grad,) = torch.autograd.grad(expected, student)
        teacher = teacher_probabilities(scores, shift=-center / 0.0625, temperature=0.0625)
        actual = dino_loss(student[:2], student[2:], teacher, temperature=0.1).mean()
        (grad,) = torch.autograd.grad(actual, student)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=100 * rtol, atol=rtol * float(expected_grad.abs().max()))


def random_masks(n: int) -> Tensor:
    masks = torch.rand(n, 4, 4) < 0.3
    masks[0] = False  # a crop without a mask counts in the divisor
    masks[1, 0, 0] = True
    return masks


@pytest.mark.parametrize("seed", range(20))
def test_ibot_equals_the_double_loop(seed: int) -> None:
    torch.manual_seed(seed)
    n, k = 5, 7
    masks = random_masks(n).flatten(1)
    scores, teacher = torch.randn(n, 16, k, dtype=torch.float64), probabilities(n, 16, k)
    expected = 0.0
    for crop in range(n):
        tokens = [j for j in range(16) if masks[crop, j]]
        if tokens:
            expected += math.fsum(naive_cross_entropy(scores[crop, j], teacher[crop, j], 0.1) for j in tokens) / len(
                tokens
            )
    weights = torch.cat([torch.full((int(c),), 1 / int(c), dtype=torch.float64) for c in masks.sum(dim=1) if c])
    actual = ibot_loss(scores[masks], teacher[masks], weights=weights, num_crops=n, temperature=0.1)
    assert float(actual) == pytest.approx(expected / n, rel=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ibot_equals_lightly_with_gradients(dtype: torch.dtype, rtol: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        masks = random_masks(6)
        total = int(masks.sum())
        student = torch.randn(total, 64, dtype=dtype, requires_grad=True)
        scores, center = torch.randn(total, 64, dtype=dtype), 0.1 * torch.randn(64, dtype=dtype)
        reference = IBOTPatchLoss(output_dim=64, student_temp=0.1)
        reference.center.center = center[None].clone()
        expected = reference(scores, student, masks, teacher_temp=0.0625)
        (expected_grad,) = torch.autograd.grad(expected, student)
        counts = masks.sum(dim=(1, 2))
        weights = (1 / counts.to(dtype)).repeat_interleave(counts)
        teacher = teacher_probabilities(scores, shift=-center / 0.0625, temperature=0.0625)
        actual = ibot_loss(student, teacher, weights=weights, num_crops=6, temperature=0.1)
        (grad,) = torch.autograd.grad(actual, student)
        # lightly's weights are fp32 whatever it is fed, which limits the agreement in float64 to fp32's rounding
        torch.testing.assert_close(actual, expected, rtol=max(rtol, 1e-7), atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5 * float(expected_grad.abs().max()))


def naive_koleo(features: Tensor) -> float:
    rows = []
    for row in features.tolist():
        length = math.sqrt(math.fsum(v * v for v in row))
        rows.append([v / length for v in row])
    logs = []
    for i, a in enumerate(rows):
        distances = []
        for j, b in enumerate(rows):
            if i != j:
                plain = math.dist(a, b)
                distances.append((plain, math.sqrt(math.fsum((x - y + 1e-8) ** 2 for x, y in zip(a, b, strict=True)))))
        logs.append(math.log(min(distances)[1] + 1e-8))
    return -math.fsum(logs) / len(logs)


@pytest.mark.parametrize("seed", range(20))
def test_koleo_equals_the_double_loop_in_every_group(seed: int) -> None:
    torch.manual_seed(seed)
    features = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    actual = koleo_loss(features)
    expected = [[naive_koleo(features[c, g]) for g in range(3)] for c in range(2)]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_koleo_equals_lightly_with_gradients(dtype: torch.dtype, rtol: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        features = torch.randn(12, 32, dtype=dtype, requires_grad=True)
        expected, actual = KoLeoLoss()(features), koleo_loss(features)
        (expected_grad,) = torch.autograd.grad(expected, features)
        (grad,) = torch.autograd.grad(actual, features)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(grad, expected_grad, rtol=100 * rtol, atol=rtol)


def test_koleo_of_duplicates_is_finite_and_moves_only_the_others() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 8)
    features[1] = features[0]
    features.requires_grad_()
    value = koleo_loss(features)
    value.backward()
    assert bool(value.isfinite()) and bool(features.grad.isfinite().all())
    assert float(features.grad.abs().max()) < 10
    assert float(features.grad[2:].abs().max()) > 0
    same = torch.ones(4, 8, requires_grad=True)
    koleo_loss(same).backward()
    assert (same.grad == 0).all()


def test_koleo_finds_neighbours_that_products_in_fp32_cannot_tell_apart() -> None:
    angles = torch.tensor([0.0, 3e-4, 4e-4, 8e-4], dtype=torch.float64)  # nearest: 3e-4, 1e-4, 1e-4, 4e-4
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    expected = -sum(math.log(d) for d in (3e-4, 1e-4, 1e-4, 4e-4)) / 4
    assert float(koleo_loss(points.float())) == pytest.approx(expected, rel=1e-3)


def test_koleo_of_one_image_is_zero() -> None:
    features = torch.randn(2, 1, 4, requires_grad=True)
    koleo_loss(features).sum().backward()
    assert (koleo_loss(features) == 0).all() and (features.grad == 0).all()


def test_half_precision_scores_are_widened() -> None:
    student, teacher = torch.randn(2, 4, 9).bfloat16(), probabilities(2, 4, 9).float()
    assert dino_loss(student, student[:0], teacher, temperature=0.1).dtype == torch.float32
    assert koleo_loss(torch.randn(4, 8).bfloat16()).dtype == torch.float32
