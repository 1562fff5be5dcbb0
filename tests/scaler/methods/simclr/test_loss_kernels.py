"""NT-Xent's kernels against cross-entropy over all scores in float64; interpreted, where there is no GPU.

The interpreter rounds to fp16 what a GPU would, and adds up in fp32; that a tensor core rounds its sums towards zero is
seen on a GPU alone: python -m pytest tests/scaler/methods/simclr/test_loss_kernels.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaler.collectives import World
from scaler.methods.simclr.loss import NTXent, nt_xent, runs_kernels
from tests.compiled import Kernel, compile_for_h200
from tests.distributed.helper import run_distributed
from tests.fake_cuda import fake_cuda
from tests.live_bytes import LiveBytes

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}  # ‖Δ‖ / ‖gradient‖
SHARED_MEMORY = 227 * 1024


def definition(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of all scores in one matrix, in float64."""
    x = x.double().requires_grad_()
    z = F.normalize(x, dim=1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    scores = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    loss = F.cross_entropy(scores, torch.arange(len(x), device=x.device).roll(len(x) // 2))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def by_kernels(
    x: Tensor, temperature: float, precision: str = "fp32", world: World | None = None
) -> tuple[NTXent, Tensor]:
    x = x.detach().clone().requires_grad_()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(x.device.type, dtype, enabled=precision != "fp32"):
        result = nt_xent(x, temperature=temperature, world=world or World(), kernels=True)
    return result, torch.autograd.grad(result.loss, x)[0]


def draws(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def views(of: Tensor, noise: float, draw: Callable[..., Tensor]) -> Tensor:
    return torch.cat([of + noise * draw(*of.shape), of + noise * draw(*of.shape)]).to(DEVICE)


def hard_cases(m: int, d: int) -> Iterator[tuple[str, Tensor]]:
    draw = draws()
    yield "random", draw(2 * m, d).to(DEVICE)
    yield "probabilities of almost 1", views(draw(m, d), 1e-4, draw)
    yield "clusters", views(draw(8, d).repeat(-(-m // 8), 1)[:m], 0.1, draw)
    yield "clusters of all but equal vectors", views(draw(8, d).repeat(-(-m // 8), 1)[:m], 0.02, draw)
    yield "one cone", views(draw(d) + 0.3 * draw(m, d), 0.1, draw)
    yield "along a few axes", views(torch.eye(d).repeat(-(-m // d), 1)[:m], 0.01, draw)


@pytest.mark.parametrize(
    ("m", "d", "temperature"),
    [(75, 64, 0.05), (75, 100, 0.1), (150, 128, 0.05), (65, 256, 0.5), (75, 512, 0.05), (3, 5, 0.1)],
)
def test_gradients_are_those_of_float64(m: int, d: int, temperature: float) -> None:
    for name, x in hard_cases(m, d):
        loss, gradient = definition(x, temperature)
        for precision in ("fp32", "bf16"):
            result, got = by_kernels(x, temperature, precision)
            assert (got - gradient).norm() <= LIMITS[precision] * gradient.norm(), (name, precision)
            assert abs(result.loss - loss) <= LIMITS[precision] * loss, (name, precision)


def test_fp32_is_as_exact_as_the_tiles_and_half_precision_is_not() -> None:
    for name, x in hard_cases(75, 64):
        _, gradient = definition(x, 0.05)
        tiles = x.clone().requires_grad_()
        nt_xent(tiles, temperature=0.05, world=World(), kernels=False).loss.backward()
        of_tiles, fp32, bf16, fp16 = (
            float((got - gradient).norm() / gradient.norm())
            for got in (tiles.grad, *(by_kernels(x, 0.05, precision)[1] for precision in LIMITS))
        )
        assert fp32 <= 1.5 * of_tiles and 4 * fp32 < bf16 == fp16, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_of_the_keys_add_up_and_every_run_has_the_same_bits(precision: str) -> None:
    from scaler.methods.simclr.loss_kernels import _grid, blocks

    x = views(draws()(540, 64), 0.2, draws(1))
    for backward in (False, True):
        use = blocks(64, exact=precision == "fp32", backward=backward)
        _, parts, per_part = _grid(use, len(x), len(x), 64)
        assert parts == 2 and per_part % use.keys == 0 and per_part * parts >= len(x) > per_part * (parts - 1)
    _, gradient = definition(x, 0.1)
    (first, got), (second, again) = (by_kernels(x, 0.1, precision) for _ in range(2))
    assert (got - gradient).norm() <= LIMITS[precision] * gradient.norm()
    assert torch.equal(first.loss, second.loss) and torch.equal(got, again)


def test_the_fewest_parts_that_keep_a_gpu_at_work() -> None:
    from scaler.methods.simclr.loss_kernels import _grid, blocks

    use = blocks(128, exact=True, backward=True)
    for a, n, parts in (
        (131_072, 131_072, 1),
        (16_384, 16_384, 1),
        (4_096, 4_096, 4),
        (1_024, 1_024, 2),
        (512, 65_536, 16),
    ):
        num_blocks, found, per_part = _grid(use, a, n, 128)
        assert (num_blocks, found) == (a // 128, parts) and per_part * found >= n


def test_accuracy_knows_ties_in_rounded_scores() -> None:
    draw = draws()
    distinct = views(draw(40, 32), 0.1, draw)
    same = draw(1, 512).repeat(80, 1).to(DEVICE)
    twice = views(draw(20, 32).repeat(2, 1), 0.0, draw)  # another key is as near as the positive
    for precision in LIMITS:
        assert by_kernels(distinct, 0.1, precision)[0].accuracy == 1
        assert by_kernels(same, 0.1, precision)[0].accuracy == by_kernels(twice, 0.1, precision)[0].accuracy == 0
        swapped = torch.cat([torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]]).to(DEVICE)
        assert by_kernels(swapped, 0.1, precision)[0].accuracy == 0.5


def test_weights_have_room_down_to_the_lowest_temperature() -> None:
    """Exponentials of ±70: shares of a softmax of 1e-60 are no numbers in fp32, weights near 1 beside 1e30 must be."""
    draw = draws()
    opposite = torch.cat([torch.eye(8)[:1], -torch.eye(8)[:1], torch.eye(8)[:1], -torch.eye(8)[:1]])
    worst = torch.cat([torch.eye(8)[:1], -torch.eye(8)[:1], -torch.eye(8)[:1], torch.eye(8)[:1]])  # positives opposite
    assert by_kernels(opposite.to(DEVICE), 1 / 70)[1].norm() <= 1e-6
    for x in (worst + 0.05 * draw(4, 8), views(draw(30, 8), 0.5, draw)):
        _, gradient = definition(x.to(DEVICE), 1 / 70)
        assert (by_kernels(x.to(DEVICE), 1 / 70)[1] - gradient).norm() <= 5e-5 * gradient.norm()


def on_ranks(world: World) -> list[tuple[Tensor, ...]]:
    """Per precision: loss, gradient of a parameter that all ranks have, accuracy; as the wrappers average them."""
    results = []
    for precision in ("fp32", "bf16"):
        both = draws()(2, 150, 16)
        weight = draws(1)(70, 16).requires_grad_()
        size = 150 // world.size
        mine = both[:, size * world.rank : size * (world.rank + 1)].flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            x = mine @ weight.T
        result, gradient = by_kernels(x, 0.1, precision, world)
        x.backward(gradient)
        assert weight.grad is not None
        mean = (world.sum_(y.detach().clone()) / world.size for y in (result.loss, weight.grad, result.accuracy))
        results.append((*mean, result.embedding_std))
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo processes run on the CPU, where kernels are interpreted")
def test_ranks_together_equal_one_process() -> None:
    weight = draws(1)(70, 16).double().requires_grad_()
    loss, gradient = definition(draws()(2, 150, 16).flatten(0, 1).double() @ weight.T, 0.1)
    (draws()(2, 150, 16).flatten(0, 1).double() @ weight.T).backward(gradient)
    assert weight.grad is not None
    for results in run_distributed(on_ranks, 3):
        for precision, result, one in zip(("fp32", "bf16"), results, on_ranks(World()), strict=True):
            assert abs(result[0] - loss) <= LIMITS[precision] * loss
            assert (result[1] - weight.grad).norm() <= LIMITS[precision] * weight.grad.norm()
            torch.testing.assert_close(result, one, rtol=2e-5, atol=1e-6)


def test_where_they_run() -> None:
    z = F.normalize(torch.ones(8, 16), dim=1)
    assert not runs_kernels(z, temperature=0.1, num_keys=8)
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch):
        for d, dtype, temperature, expected in (
            (512, torch.float32, 0.05, True),
            (16, torch.float32, 1 / 70, True),
            (513, torch.float32, 0.05, False),
            (512, torch.float64, 0.05, False),
            (16, torch.float32, 1 / 75, False),
        ):
            on_gpu = torch.empty(8, d, dtype=dtype, device="cuda")
            assert runs_kernels(on_gpu, temperature=temperature, num_keys=8) is expected


def test_operators_are_what_they_say_of_fake_tensors() -> None:
    from scaler.methods.simclr.loss_kernels import KernelPairs, _sums, _weighted

    z = F.normalize(draws()(1060, 20), dim=1).to(DEVICE)
    for exact in (False, True):
        high, low, lengths = KernelPairs(z[:40], z, temperature=0.1, exact=exact)._pieces
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(_sums, (high, low, lengths, 1e-9, 40, 1060, exact), test_utils=checks)
        arguments = (high, low, lengths, lengths, lengths[0], 1e-9, 40, 1060, 20, exact)
        torch.library.opcheck(_weighted, arguments, test_utils=checks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_131072_embeddings(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as gpu, LiveBytes() as memory:
        x = torch.empty(131_072, 128, device="cuda", requires_grad=True)
        before = memory.live
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            nt_xent(x, temperature=0.1, world=World()).loss.backward()
    assert gpu.waits == [] and gpu.own == {"scaler::nt_xent_sums", "scaler::nt_xent_weighted"}
    assert before == 4 * x.numel() and memory.peak - before < 0.6e9  # eight times the embeddings are 0.54 GB


def test_they_fit_an_h200() -> None:
    """The fullest in registers, in shared memory, and in both."""
    from scaler.methods.simclr.loss_kernels import blocks

    shapes = [(128, True), (256, True), (512, False)]
    for found, (width, exact) in zip(
        compile_for_h200([_weighted_kernel(width, exact=exact) for width, exact in shapes]), shapes, strict=True
    ):
        use = blocks(width, exact=exact, backward=True)
        pieces = 2 * width * (use.anchors * (1 + exact) + use.stages * use.keys)
        assert pieces <= found.shared <= SHARED_MEMORY
        assert found.spilled <= (128 if width == 128 else 800)  # Triton 3.9: 0, 456 and 40; 3.6: 104, 800 and 616


def _weighted_kernel(width: int, *, exact: bool) -> Kernel:
    from scaler.methods.simclr.loss_kernels import blocks

    use = blocks(width, exact=exact, backward=True)
    half, single, integer = (dict.fromkeys(names.split(), kind) for names, kind in (
        ("high low", "*fp16"), ("lengths inverse unit out", "*fp32"), ("a n d per_part", "i32"),
    ))  # fmt: skip
    return Kernel(
        "scaler.methods.simclr.loss_kernels:weighted_kernel",
        {**half, **single, "scale": "fp32", **integer},
        {"width": width, "block_a": use.anchors, "block_n": use.keys, "channels": use.channels, "exact": exact},
        num_warps=use.warps,
        num_stages=use.stages,
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_long_sums_on_a_gpu(precision: str) -> None:
    """16,384 keys, so that what a tensor core rounds towards zero would add up."""
    for temperature, x in ((0.05, draws()(16_384, 128)), (0.05, views(draws()(64, 128).repeat(128, 1), 0.1, draws(1)))):
        exact = x.double().to(DEVICE).requires_grad_()
        nt_xent(exact, temperature=temperature, world=World()).loss.backward()
        assert exact.grad is not None
        got = by_kernels(x.to(DEVICE), temperature, precision)[1]
        assert (got - exact.grad).norm() <= LIMITS[precision] * exact.grad.norm()
