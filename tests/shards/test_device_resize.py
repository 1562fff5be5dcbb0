"""Pictures cut on a device are within a grey level of those that a worker cuts, whatever the box, size and filter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from shards import resize
from shards.device_resize import cut_on_device, cut_with_torch, cut_with_triton
from shards.resize import Cut, Pixels
from tests.compiled import Kernel, compile_for_h200
from tests.images import make_pixels
from tests.shards.test_resize import a_case, needs_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATHS = [cut_with_torch, cut_with_triton]
Path = Callable[..., None]


def differences(path: Path, pictures: list[Pixels], cuts: list[list[Cut]], size: int, interpolation: str) -> Pixels:
    """Grey levels between a path and the workers' kernel, of all pictures in rows of a batch that is one row longer."""
    count, rows = len(cuts[0]), list(range(len(pictures)))[::-1]
    out = torch.full((count, len(pictures) + 1, 3, size, size), 77, dtype=torch.uint8, device=DEVICE)
    planes = [torch.from_numpy(p).permute(2, 0, 1).contiguous().to(DEVICE) for p in pictures]
    path(out, planes, np.array(cuts).astype(np.int64), rows=rows, interpolation=interpolation)
    assert (out[:, -1] == 77).all()  # nobody's row
    expected = np.zeros((count, len(pictures), 3, size, size), dtype=np.uint8)
    for picture, row, copies in zip(pictures, rows, cuts, strict=True):
        resize.cut_with_kernel(expected[:, row], picture, copies, interpolation=interpolation)
    return np.abs(out[:, :-1].cpu().numpy().astype(int) - expected)


@needs_kernel
@settings(max_examples=80, deadline=None)
@given(a_case())
def test_torchs_path_on_any_box(case: tuple[Pixels, list[Cut], int, str]) -> None:
    picture, cuts, size, interpolation = case
    assert differences(cut_with_torch, [picture], [cuts], size, interpolation).max() <= 1


def noise(height: int, width: int, seed: int) -> Pixels:
    """Half black and white, where a cubic overshoots most, half any values."""
    generator = np.random.default_rng(seed)
    picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture[: height // 2] = 255 * (picture[: height // 2] > 127)
    return picture


@needs_kernel
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("sizes", "size", "cuts"),
    [
        # Down and up, mirrored, a part of what is resized, at all borders; sizes of one tile and of two.
        ([(40, 70), (33, 21)], 33, [Cut(0, 0, 33, 21, 33, 33), Cut(13, 5, 20, 16, 37, 35, 3, 1, flip=True)]),
        ([(90, 24)], 12, [Cut(0, 1, 90, 22, 12, 14, 0, 2)]),
        ([(9, 11)], 20, [Cut(8, 10, 1, 1, 20, 20), Cut(4, 0, 5, 1, 20, 20, flip=True)]),
        ([(1, 1)], 5, [Cut(0, 0, 1, 1, 5, 5)]),
    ],
)
def test_borders_sizes_and_flips(path: Path, sizes, size: int, cuts: list[Cut], interpolation: str) -> None:
    pictures = [noise(height, width, seed=height) for height, width in sizes]
    found = differences(path, pictures, [cuts] * len(pictures), size, interpolation)
    assert found.max() <= 1 and found.mean() < 0.02


@needs_kernel
def test_the_middle_of_a_long_picture_is_exact() -> None:
    """A position is a whole pixel and a part of one: as one float32 it would be off by 1/1000 of a pixel here, which
    every thirtieth pixel shows."""
    picture = np.zeros((2, 16_000, 3), dtype=np.uint8)
    picture[:, ::2] = 255
    cuts = [Cut(0, 4, 2, 15_990, 64, 15_000, 0, 14_800)]
    for interpolation in ("bicubic", "bilinear"):
        assert differences(cut_with_triton, [picture], [cuts], 64, interpolation).mean() < 0.01


@needs_kernel
def test_an_even_picture_stays_as_it_is() -> None:
    for path in PATHS:
        for value in (0, 1, 255):
            out = torch.zeros((1, 1, 3, 7, 7), dtype=torch.uint8, device=DEVICE)
            picture = torch.full((3, 60, 9), value, dtype=torch.uint8, device=DEVICE)
            path(out, [picture], np.array([[Cut(1, 1, 58, 8, 7, 7)]]).astype(int), rows=[0], interpolation="bicubic")
            assert (out == value).all()


def test_a_device_without_triton_takes_torchs_path() -> None:
    picture = torch.from_numpy(make_pixels(20, 20, seed=0)).permute(2, 0, 1).contiguous()
    cuts, options = np.array([[Cut(2, 3, 9, 9, 8, 8)]]).astype(np.int64), {"rows": [0], "interpolation": "bicubic"}
    chosen, expected = torch.zeros((2, 1, 1, 3, 8, 8), dtype=torch.uint8)
    cut_on_device(chosen, [picture], cuts, **options)
    cut_with_torch(expected, [picture], cuts, **options)
    assert torch.equal(chosen, expected) and chosen.any()


def test_kernels_compile_for_an_h200_without_spills() -> None:
    module, table = "shards.device_resize_kernels", {"table": "*i64", "size": "i32"}
    kernels = [
        Kernel(f"{module}:{name}", {**arguments, **table}, {"CUBIC": cubic, "TILE": 32}, num_warps=8)
        for name, arguments in (
            ("_along", {"packed": "*u8", "between": "*i16"}),
            ("_down", {"between": "*i16", "out": "*u8"}),
        )
        for cubic in (True, False)
    ]
    for found in compile_for_h200(kernels):
        assert found.spilled == 0 and found.registers <= 80 and found.shared <= 1024


def test_the_operation_says_what_it_does_to_compilers_and_fake_tensors() -> None:
    from shards.device_resize_kernels import _cut

    picture, out = torch.arange(3 * 4 * 5, dtype=torch.uint8, device=DEVICE), torch.zeros((1, 1, 3, 4, 4)).byte()
    table = torch.tensor([[0, 0, 4, 5, 4, 4, 0, 0, 0, 0, 0, 0, 4, 5]], device=DEVICE)
    torch.library.opcheck(
        _cut, (out.to(DEVICE), picture, table, 3 * 4 * 4, 4, True), test_utils=("test_schema", "test_faketensor")
    )
