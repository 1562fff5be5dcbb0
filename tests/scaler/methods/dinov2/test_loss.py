"""DINO, iBOT and KoLeo against loops in float64, against full scores with autograd, and against lightly's losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from torch import Tensor

from scaler.methods.dinov2.loss import dino, ibot, koleo_loss
from scaler.methods.dinov2.prototypes import Comparison, CrossEntropy, Teacher, cross_entropy
from tests.live_bytes import LiveBytes

ALL_AT_ONCE = 1 << 30
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def naive_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> float:
    p = softmax([v / temperature for v in student.tolist()])
    return -math.fsum(t * math.log(q) for t, q in zip(teacher.tolist(), p, strict=True))


def probabilities(*shape: int) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).softmax(dim=-1)


def certain(q: Tensor) -> Teacher:
    """A teacher whose probabilities are just these [t, n, K]."""
    k = q.shape[-1]
    return Teacher(q.log(), torch.eye(k, dtype=q.dtype), torch.zeros(k, dtype=q.dtype), 1.0)


def compared(comparison: Comparison, prototypes: Tensor, budget: int) -> tuple[Tensor, CrossEntropy]:
    total, (values,) = cross_entropy([comparison], prototypes, temperature=0.1, tile_elements=budget)
    assert not values.loss.requires_grad and values.loss.item() * comparison.scale == pytest.approx(total.item())
    return total, values


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 4), num_local=st.integers(0, 3), k=st.integers(2, 9),
    budget=st.sampled_from([1, 60, ALL_AT_ONCE]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_dino_equals_the_double_loop(seed: int, n: int, num_local: int, k: int, budget: int) -> None:
    torch.manual_seed(seed)
    z, prototypes = torch.randn(2 + num_local, n, 5, dtype=torch.float64), torch.randn(k, 5, dtype=torch.float64)
    q, scores = probabilities(2, n, k), z @ prototypes.T
    terms = [
        naive_cross_entropy(scores[v, i], q[t, i], 0.1)
        for i in range(n)
        for t in range(2)
        for v in range(2 + num_local)
        if v != t
    ]
    assert len(terms) == n * (2 + 2 * num_local)
    _, actual = compared(dino(z, certain(q)), prototypes, budget)
    assert float(actual.loss) == pytest.approx(math.fsum(terms) / len(terms), rel=1e-10)
    entropy = math.fsum(-p * math.log(p) for p in q.flatten().tolist()) / (2 * n * math.log(k))
    assert float(actual.entropy) == pytest.approx(entropy, rel=1e-9)
    same = [scores[v, i].argmax() == q[1 - v, i].argmax() for v in range(2) for i in range(n)]
    assert float(actual.agreement) == pytest.approx(sum(map(float, same)) / len(same))


@PRECISIONS
def test_dino_equals_lightly_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        z, prototypes = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((10, 6, 16), (64, 16)))
        teacher_z, teacher_prototypes = torch.randn(2, 6, 16, dtype=dtype), torch.randn(64, 16, dtype=dtype)
        center = 0.1 * torch.randn(64, dtype=dtype)
        reference = DINOLoss(output_dim=64, teacher_temp=0.05, student_temp=0.1)
        reference.center = center[None, None].clone()
        # lightly keeps the temperature as an fp32 tensor; 0.0625 is exact in both
        expected = reference(list(teacher_z @ teacher_prototypes.T), list(z @ prototypes.T), teacher_temp=0.0625)
        expected_gradients = torch.autograd.grad(expected, [z, prototypes])
        teacher = Teacher(teacher_z, teacher_prototypes, -center / 0.0625, 0.0625)
        for budget in (ALL_AT_ONCE, 2000):
            actual, _ = compared(dino(z, teacher), prototypes, budget)
            assert actual.item() == pytest.approx(expected.item(), rel=tolerance)
            gradients = torch.autograd.grad(actual, [z, prototypes])
            for gradient, wanted in zip(gradients, expected_gradients, strict=True):
                assert relative(gradient, wanted) < 10 * tolerance


def random_masks(n: int) -> Tensor:
    masks = torch.rand(n, 4, 4) < 0.3
    masks[0] = False  # a crop without a mask counts in the divisor
    masks[1, 0, 0] = True
    return masks


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), k=st.integers(2, 9), budget=st.sampled_from([1, 60, 10**6]))
@settings(max_examples=100, deadline=None)
def test_ibot_equals_the_double_loop(seed: int, n: int, k: int, budget: int) -> None:
    torch.manual_seed(seed)
    masks = random_masks(n).flatten(1)
    z, q = torch.randn(n, 16, 5, dtype=torch.float64), probabilities(n, 16, k)
    prototypes = torch.randn(k, 5, dtype=torch.float64)
    scores, expected = z @ prototypes.T, []
    for crop in range(n):
        tokens = [j for j in range(16) if masks[crop, j]]
        losses = [naive_cross_entropy(scores[crop, j], q[crop, j], 0.1) for j in tokens]
        expected.append(math.fsum(losses) / len(tokens) if tokens else 0.0)
    weights = torch.cat([torch.full((int(c),), 1 / int(c), dtype=torch.float64) for c in masks.sum(dim=1) if c])
    z, teacher = z[masks].requires_grad_(), certain(q[masks][None])
    prototypes.requires_grad_()
    actual, _ = compared(ibot(z, teacher, weights=weights, num_crops=n), prototypes, budget)
    assert actual.item() == pytest.approx(math.fsum(expected) / n, rel=1e-10)
    plain = (F.cross_entropy(z @ prototypes.T / 0.1, q[masks], reduction="none") * weights).sum() / n
    gradients = torch.autograd.grad(actual, [z, prototypes])
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, [z, prototypes]), strict=True):
        assert relative(gradient, wanted) < 1e-10


@PRECISIONS
def test_ibot_equals_lightly_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        masks = random_masks(6)
        total = int(masks.sum())
        z, prototypes = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((total, 16), (64, 16)))
        teacher_z, teacher_prototypes = torch.randn(total, 16, dtype=dtype), torch.randn(64, 16, dtype=dtype)
        center = 0.1 * torch.randn(64, dtype=dtype)
        reference = IBOTPatchLoss(output_dim=64, student_temp=0.1)
        reference.center.center = center[None].clone()
        expected = reference(teacher_z @ teacher_prototypes.T, z @ prototypes.T, masks, teacher_temp=0.0625)
        expected_gradients = torch.autograd.grad(expected, [z, prototypes])
        counts = masks.sum(dim=(1, 2))
        tolerance = max(tolerance, 1e-7)  # lightly's weights are fp32 whatever it is fed
        for budget in (ALL_AT_ONCE, 1000):
            teacher = Teacher(teacher_z[None], teacher_prototypes, -center / 0.0625, 0.0625)
            weights = (1 / counts.to(dtype)).repeat_interleave(counts)
            actual, _ = compared(ibot(z, teacher, weights=weights, num_crops=6), prototypes, budget)
            assert actual.item() == pytest.approx(expected.item(), rel=tolerance)
            gradients = torch.autograd.grad(actual, [z, prototypes])
            for gradient, wanted in zip(gradients, expected_gradients, strict=True):
                assert relative(gradient, wanted) < 10 * tolerance


def test_comparisons_share_a_gradient_and_have_scales() -> None:
    torch.manual_seed(0)
    z, prototypes = (torch.randn(*shape, requires_grad=True).double() for shape in ((4, 3, 5), (7, 5)))
    first, second = certain(probabilities(2, 3, 7)), certain(probabilities(1, 12, 7))
    weights = torch.rand(12).double()
    pairs = dino(z, first, scale=0.3), ibot(z.flatten(0, 1), second, weights=weights, num_crops=2, scale=2.0)
    together, values = cross_entropy(pairs, prototypes, temperature=0.1, tile_elements=100)
    apart = [compared(pair, prototypes, ALL_AT_ONCE) for pair in pairs]
    assert together.item() == pytest.approx(sum(total.item() for total, _ in apart), rel=1e-12)
    assert [v.loss.item() for v in values] == pytest.approx([v.loss.item() for _, v in apart], rel=1e-12)
    gradients = [torch.autograd.grad(t, [z, prototypes]) for t in (3 * together, 3 * sum(total for total, _ in apart))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(cross_entropy(pairs, prototypes, temperature=0.1, tile_elements=100)[0], together)


@pytest.mark.parametrize("n", [32, 128])
def test_scores_take_their_budget_and_the_gradient_is_there_once(n: int) -> None:
    z, prototypes = (torch.randn(*shape, requires_grad=True) for shape in ((10, n, 16), (4000, 16)))
    tokens, shift, budget = z[0].repeat(10, 1), torch.zeros(4000), 1 << 18
    first, second = (Teacher(x.detach(), prototypes.detach(), shift, 0.07) for x in (z[:2], tokens[None]))
    with LiveBytes() as memory:
        pairs = [dino(z, first), ibot(tokens, second, weights=shift[: len(tokens)], num_crops=n)]
        cross_entropy(pairs, prototypes, temperature=0.1, tile_elements=budget)[0].backward()
    inputs = z.numel() + tokens.numel()
    assert memory.peak < 4 * (1.1 * budget + prototypes.numel() + 4 * inputs)


def test_bfloat16_gradients_and_what_float16_would_round_to_zero() -> None:
    torch.manual_seed(0)
    z, prototypes = (F.normalize(torch.randn(*shape), dim=-1).requires_grad_() for shape in ((4, 32, 16), (5000, 16)))
    teacher = Teacher(0.8 * z[:2].detach(), prototypes.detach(), torch.zeros(5000), 0.07)
    found = {}
    for dtype in (None, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            total, values = compared(dino(z, teacher), prototypes, 1 << 17)
        assert total.dtype == values.entropy.dtype == torch.float32
        found[dtype] = [total.detach(), *torch.autograd.grad(total, [z, prototypes])]
    for got, exact in zip(found[torch.bfloat16], found[None], strict=True):
        assert got.dtype == torch.float32 and relative(got, exact) < 0.01
    assert relative(found[torch.bfloat16][1], found[None][1]) > 1e-4, "gradients' factors are rounded"
    assert torch.equal(found[torch.bfloat16][0], found[None][0]), "scores' are not, on a CPU"
    assert all(map(torch.equal, found[torch.float16], found[None]))


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


@PRECISIONS
def test_koleo_equals_lightly_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        features = torch.randn(12, 32, dtype=dtype, requires_grad=True)
        expected, actual = KoLeoLoss()(features), koleo_loss(features)
        (expected_grad,) = torch.autograd.grad(expected, features)
        (grad,) = torch.autograd.grad(actual, features)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad, expected_grad, rtol=100 * tolerance, atol=tolerance)


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


def test_half_precision_features_are_widened() -> None:
    assert koleo_loss(torch.randn(4, 8).bfloat16()).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    z, prototypes, teacher_z = (torch.randn(*shape) / 4 for shape in ((6, 32, 16), (500, 16), (2, 32, 16)))
    found = []
    for device, dtype in (("cpu", None), ("cuda", None), ("cuda", torch.bfloat16)):
        inputs = [x.to(device).requires_grad_() for x in (z, prototypes)]
        teacher = Teacher(teacher_z.to(device), prototypes.to(device), torch.zeros(500, device=device), 0.07)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            total, _ = compared(dino(inputs[0], teacher), inputs[1], 1 << 15)
        found.append([x.cpu() for x in (total.detach(), *torch.autograd.grad(total, inputs))])
    for exact, full, half in zip(*found, strict=True):
        assert relative(full, exact) < 1e-5 and relative(half, exact) < 0.02
