"""Colours by Triton's kernels: interpreted on a CPU they give what torch's operations give, and they fit an H200."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scaler.nn import color
from scaler.nn.color import Color, apply_color_with_torch, jitter_operations
from tests.compiled import Kernel, compile_for_h200
from tests.scaler.nn.test_color import ALONE, FULL, MEAN, STD, draw, images

kernels = pytest.importorskip("scaler.nn.color_kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = replace(FULL, solarize_p=0.0)  # which jumps where a rounding error of the others may lie
CASES: dict[str, Color] = {**ALONE, "whole": WHOLE, "wide blur": replace(ALONE["wide blur"], blur_kernel=11)}


def by_kernels(x, parameters, *, dtype=torch.float32, channels_last=False):
    operations = jitter_operations(parameters)
    kinds = {"mean": MEAN, "std": STD, "dtype": dtype, "channels_last": channels_last}
    return kernels.apply(x.to(DEVICE), parameters, operations=operations, **kinds).cpu()


@pytest.mark.parametrize("name", CASES)
def test_kernels_give_what_torch_gives(name: str) -> None:
    m = 3 if CASES[name].blur_kernel > 7 else 9
    x, p = images(m, (23, 47)), draw(CASES[name], m)  # two blocks of pixels, the second one not full
    expected = apply_color_with_torch(x, p, mean=MEAN, std=STD)
    torch.testing.assert_close(by_kernels(x, p), expected, atol=1e-5, rtol=1e-5)


def test_every_order_of_the_jitter() -> None:
    x, p = images(24, (6, 7)), draw(replace(ALONE["jitter"], jitter_p=1.0), 24)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    p.order[:] = orders[[len(set(o)) == 4 for o in orders.tolist()]]
    torch.testing.assert_close(by_kernels(x, p), apply_color_with_torch(x, p, mean=MEAN, std=STD), atol=1e-5, rtol=1e-5)


def test_solarize_takes_the_threshold_itself_and_floats_are_taken() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    p = draw(Color(solarize_p=1), 1)
    expected = apply_color_with_torch(x, p, mean=MEAN, std=STD)
    torch.testing.assert_close(by_kernels(x, p), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(by_kernels(x / 255, p), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_come_in_the_dtype_and_memory_that_are_wanted(dtype: torch.dtype, channels_last: bool) -> None:
    x, p = images(5, (12, 20)), draw(replace(WHOLE, blur_kernel=3), 5)
    expected = by_kernels(x, p)
    found = by_kernels(x, p, dtype=dtype, channels_last=channels_last)
    assert found.dtype == dtype and found.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    # A unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    on_cpu = color.apply_color(x, p, mean=MEAN, std=STD, dtype=dtype, channels_last=channels_last)
    assert (on_cpu.dtype, on_cpu.stride()) == (found.dtype, found.stride())


def test_kernels_fit_an_h200_without_spilling() -> None:
    module, constants = "scaler.nn.color_kernels:", {"WIDTH": kernels._WIDTH, "BLOCK": kernels._BLOCK}
    floats = ("scratch", "table", "means", "normalization", "source", "target")
    types = dict.fromkeys(floats, "*fp32") | {"x": "*u8", "out": "*bf16", "rows": "*i32", "threshold": "fp32"}
    strides = ("image_stride", "channel_stride", "pixel_stride")
    made = compile_for_h200(
        [
            Kernel(
                module + name, {a: types.get(a, "i32") for a in arguments}, {**constants, **dict.fromkeys(more, True)}
            )
            for name, arguments, more in (
                ("_means", ("x", "means", "table", "num_pixels"), ("BYTES",)),
                (
                    "_colors",
                    ("x", "out", "scratch", "table", "means", "normalization", "num_pixels", "threshold", *strides),
                    ("BYTES",),
                ),
                ("_rows", ("source", "target", "table", "rows", "num_pixels", "width", "taps"), ()),
                (
                    "_columns",
                    (
                        "source",
                        "out",
                        "table",
                        "rows",
                        "normalization",
                        "height",
                        "width",
                        "taps",
                        "threshold",
                        *strides,
                    ),
                    (),
                ),
            )
        ]
    )
    assert all(kernel.spilled == 0 and kernel.shared <= 1024 and kernel.registers <= 128 for kernel in made)
