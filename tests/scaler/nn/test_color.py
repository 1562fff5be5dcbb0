"""Colour operations against torchvision's, image by image, and the statistics and keys of their parameters."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from torch import Tensor

from scaler.nn.color import (
    Color,
    ColorParameters,
    _blur_by_convolution,
    _blur_by_shifts,
    apply_color,
    concatenate,
    gaussian_taps,
    sample_color,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FULL = Color(
    brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2,
    blur_p=0.5, blur_kernel=9, solarize_p=0.3, solarize_threshold=128,
)  # fmt: skip


def images(m: int, size: tuple[int, int] = (20, 24), seed: int = 0) -> Tensor:
    """Uint8 [m, 3, h, w], with gray, black, white and saturated pixels among the random ones."""
    x = torch.randint(0, 256, (m, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x[:, :, 0] = x[:, :1, 0]
    x[:, :, 1, :8], x[:, :, 1, 8:] = 0, 255
    x[:, 0, 2], x[:, 1, 3] = 255, 0
    return x


def draw(color: Color, m: int, *, seed: int = 0, view: str = "v", copy: int = 0, epoch: int = 0) -> ColorParameters:
    return sample_color(color, seed=seed, epochs=torch.full((m,), epoch), ids=torch.arange(m), view=view, copy=copy)


def by_torchvision(image: Tensor, p: ColorParameters, i: int) -> Tensor:
    """One uint8 image through torchvision's functions with the parameters of row i."""
    x = V.to_dtype(image, torch.float32, scale=True)
    if p.jitter[i]:
        brightness, contrast, saturation, hue = (float(value) for value in p.factors[i])
        operations = (
            lambda x: V.adjust_brightness(x, brightness),
            lambda x: V.adjust_contrast(x, contrast),
            lambda x: V.adjust_saturation(x, saturation),
            lambda x: V.adjust_hue(x, hue),
        )
        for operation in p.order[i]:
            x = operations[operation](x)
    if p.grayscale[i]:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    if p.sigma[i] > 0:
        x = V.gaussian_blur(x, [p.blur_kernel] * 2, [float(p.sigma[i])] * 2)
    if p.solarize[i]:
        x = V.solarize(x, p.solarize_threshold / 255)
    return V.normalize(x, MEAN, STD)


ALONE = {
    "nothing": Color(),
    "brightness": Color(brightness=0.8, jitter_p=1),
    "contrast": Color(contrast=0.8, jitter_p=1),
    "saturation": Color(saturation=1.5, jitter_p=1),
    "hue": Color(hue=0.5, jitter_p=1),
    "jitter": Color(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8),
    "grayscale": Color(grayscale_p=0.5),
    "blur": Color(blur_p=0.7, blur_kernel=7),
    "wide blur": Color(blur_p=1, blur_kernel=23),
    "solarize": Color(solarize_p=0.5, solarize_threshold=128),
}


@pytest.mark.parametrize("color", ALONE.values(), ids=ALONE.keys())
def test_each_operation_equals_torchvision(color: Color) -> None:
    x = images(24)
    p = draw(color, 24)
    expected = torch.stack([by_torchvision(image, p, i) for i, image in enumerate(x)])
    torch.testing.assert_close(apply_color(x, p, mean=MEAN, std=STD), expected, atol=1e-5, rtol=1e-5)


def test_all_operations_together_equal_torchvision() -> None:
    # solarise jumps at its threshold, where a rounding difference of the steps before it may pick the other side
    x = images(64)
    color = replace(FULL, solarize_p=0.0)
    p = draw(color, 64)
    expected = torch.stack([by_torchvision(image, p, i) for i, image in enumerate(x)])
    torch.testing.assert_close(apply_color(x, p, mean=MEAN, std=STD), expected, atol=3e-5, rtol=1e-5)


def test_solarize_takes_the_threshold_itself() -> None:
    x = torch.tensor([127, 128, 129], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    y = apply_color(x, draw(Color(solarize_p=1), 1), mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(y[0, 0, 0] * 255, torch.tensor([127.0, 127.0, 126.0]))


def test_float_images_give_what_bytes_give() -> None:
    x, p = images(8), draw(FULL, 8)
    as_float = x.float() / 255
    assert torch.equal(
        apply_color(x, p, mean=MEAN, std=STD), apply_color(as_float, p, mean=MEAN, std=STD)
    ) and torch.equal(as_float, x.float() / 255)


def test_both_ways_to_blur_agree() -> None:
    y = torch.rand(5, 3, 17, 30, generator=torch.Generator().manual_seed(0))
    taps = gaussian_taps(torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0]), 11)
    torch.testing.assert_close(_blur_by_convolution(y, taps), _blur_by_shifts(y, taps), atol=1e-6, rtol=1e-6)


def test_other_images_of_the_batch_change_nothing() -> None:
    x = images(40, (64, 64))
    ids, epochs = torch.arange(100, 140), torch.arange(40) % 3
    p = sample_color(FULL, seed=3, epochs=epochs, ids=ids, view="v", copy=0)
    together = apply_color(x, p, mean=MEAN, std=STD)
    chosen = torch.tensor([39, 4, 17, 5])
    q = sample_color(FULL, seed=3, epochs=epochs[chosen], ids=ids[chosen], view="v", copy=0)
    torch.testing.assert_close(apply_color(x[chosen], q, mean=MEAN, std=STD), together[chosen], atol=1e-6, rtol=0)


def test_every_key_counts() -> None:
    base = draw(FULL, 50)
    for other in (draw(FULL, 50, seed=1), draw(FULL, 50, view="w"), draw(FULL, 50, copy=1), draw(FULL, 50, epoch=1)):
        assert not np.isclose(base.factors, other.factors).any(axis=1).all()
        assert (base.factors == other.factors).mean() < 0.01
    assert np.array_equal(base.factors, draw(FULL, 50).factors)


def test_probabilities_and_ranges() -> None:
    m = 20_000
    p = draw(FULL, m)
    for flags, probability in (
        (p.jitter, 0.8), (p.grayscale, 0.2), (p.sigma > 0, 0.5), (p.solarize, 0.3),
    ):  # fmt: skip
        assert abs(flags.mean() - probability) < 5 * (probability * (1 - probability) / m) ** 0.5
    for i, (low, high) in enumerate([(0.2, 1.8)] * 3 + [(-0.2, 0.2)]):
        values = (p.factors[:, i] - low) / (high - low)
        assert 0 <= values.min() < 0.01 and 0.99 < values.max() <= 1 and abs(values.mean() - 0.5) < 0.01
    sigma = p.sigma[p.sigma > 0]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.02
    _, counts = np.unique(p.order @ (1, 4, 16, 64), return_counts=True)
    assert len(counts) == 24 and abs(counts / m - 1 / 24).max() < 0.01
    flags = np.stack([p.jitter, p.grayscale, p.sigma > 0, p.solarize]).astype(float)
    assert abs(np.corrcoef(flags) - np.eye(4)).max() < 0.04


def test_strengths_above_one_stop_at_zero() -> None:
    p = draw(Color(brightness=1.5, jitter_p=1), 1000)
    assert 0 <= p.factors[:, 0].min() < 0.02 and 2.48 < p.factors[:, 0].max() <= 2.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"brightness": -0.1}, "negative"),
        ({"hue": 0.6}, r"outside \[0, 0.5\]"),
        ({"blur_p": 1.5}, "blur_p=1.5 is not a probability"),
        ({"blur_kernel": 4}, "must be odd"),
        ({"blur_sigma": (0.0, 2.0)}, "0 < low <= high"),
    ],
)
def test_wrong_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Color(**values)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="3 images but colour parameters of 2"):
        apply_color(images(3), draw(FULL, 2), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="blur_kernel=23 needs images of more than 11 pixels"):
        apply_color(images(2, (11, 30)), draw(ALONE["wide blur"], 2), mean=MEAN, std=STD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    x, p = images(32, (64, 64)), draw(replace(FULL, solarize_p=0.0), 32)
    on_cpu = apply_color(x, p, mean=MEAN, std=STD)
    torch.testing.assert_close(apply_color(x.cuda(), p, mean=MEAN, std=STD).cpu(), on_cpu, atol=2e-5, rtol=1e-5)


def test_copies_are_drawn_together_as_one_by_one_and_as_ever() -> None:
    """The checksum: a run that is resumed with a newer version goes on with the same colours."""
    keys = {"seed": 3, "epochs": torch.full((20,), 2), "ids": torch.arange(20), "view": "v"}
    names = ("factors", "order", "jitter", "grayscale", "sigma", "solarize")
    together, total = sample_color(FULL, **keys, copy=range(3)), 0
    for copy in range(3):
        alone = sample_color(FULL, **keys, copy=copy)
        for name in names:
            assert (getattr(alone, name) == getattr(together, name)[20 * copy : 20 * (copy + 1)]).all()
            total = zlib.crc32(getattr(alone, name).tobytes(), total)
    assert total == 3924238376


def test_batches_with_different_colours_go_as_one() -> None:
    p, q = draw(FULL, 5), draw(replace(FULL, blur_p=1.0, solarize_p=0.0), 4, seed=1)
    x = images(9)
    parts = [apply_color(x[:5], p, mean=MEAN, std=STD), apply_color(x[5:], q, mean=MEAN, std=STD)]
    assert torch.equal(apply_color(x, concatenate([p, q]), mean=MEAN, std=STD), torch.cat(parts))
    with pytest.raises(ValueError, match=r"2 different \(blur_kernel, solarize_threshold\)"):
        concatenate([p, draw(replace(FULL, blur_kernel=3), 4)])
