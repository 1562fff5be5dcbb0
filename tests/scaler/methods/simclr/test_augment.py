"""The views: their geometry, colours, keys and order."""

from __future__ import annotations

import pytest
import torch

from scaler.methods.simclr.augment import make_color, make_views
from scaler.methods.simclr.method import SimCLR
from scaler.nn.color import apply_color, sample_color
from tests.scaler.methods.simclr.batches import VIT, make_batch, make_method

Settings = SimCLR.Settings


def test_the_published_views() -> None:
    views = make_views(Settings(), image_size=224)
    assert [(v.name, v.size, v.count, v.scale, v.flip, v.interpolation) for v in views] == [
        ("view_1", 224, 1, (0.08, 1.0), 0.5, "bicubic"),
        ("view_2", 224, 1, (0.08, 1.0), 0.5, "bicubic"),
    ]
    color = make_color(Settings(), image_size=224)
    assert (color.brightness, color.contrast, color.saturation, color.hue) == pytest.approx((0.8, 0.8, 0.8, 0.2))
    assert (color.jitter_p, color.grayscale_p, color.blur_p, color.blur_sigma) == (0.8, 0.2, 0.5, (0.1, 2.0))
    assert (color.blur_kernel, color.solarize_p) == (23, 0.0)


def test_strengths_of_single_channels() -> None:
    color = make_color(Settings(color_strength=0.5, contrast=0.3, hue=0.0), image_size=96)
    assert (color.brightness, color.contrast, color.saturation, color.hue) == pytest.approx((0.4, 0.3, 0.4, 0.0))
    own = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    color = make_color(Settings(**own), image_size=96)
    assert {name: getattr(color, name) for name in own} == own
    with pytest.raises(ValueError, match=r"color_strength 0\.5 has no effect where brightness, .* are all given"):
        Settings(color_strength=0.5, **own)
    with pytest.raises(ValueError, match=r"less than or equal to 0\.5"):
        Settings(hue=0.6)


@pytest.mark.parametrize(("size", "kernel"), [(16, 0), (19, 0), (20, 3), (32, 3), (96, 9), (210, 21), (224, 23)])
def test_the_kernel_is_a_tenth_of_the_image(size: int, kernel: int) -> None:
    assert make_color(Settings(), image_size=size).blur_kernel == kernel


def test_first_views_then_second_views_each_with_its_own_colours() -> None:
    method, batch = make_method(**VIT), make_batch(range(12))
    images = method.augment(batch, seed=7, step=0)["images"]
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.float32
    for half, name in enumerate(("view_1", "view_2")):
        color = make_color(method.settings, image_size=16)
        parameters = sample_color(color, seed=7, epochs=batch["epochs"], ids=batch["ids"], view=name, copy=0)
        mean, std = method.normalization
        expected = apply_color(batch["views"][name][0], parameters, mean=mean, std=std)
        assert torch.equal(images[12 * half : 12 * (half + 1)], expected)


def test_colours_do_not_depend_on_the_layout_or_the_step() -> None:
    method = make_method(**VIT)
    whole = method.augment(make_batch(range(12)), seed=7, step=0)["images"].view(2, 12, 3, 16, 16)
    part = method.augment(make_batch(range(4, 8)), seed=7, step=3)["images"].view(2, 4, 3, 16, 16)
    torch.testing.assert_close(part, whole[:, 4:8], atol=1e-5, rtol=1e-5)
    other = method.augment(make_batch(range(12)), seed=8, step=0)["images"].view(2, 12, 3, 16, 16)
    assert not torch.allclose(other, whole)


def test_without_normalisation_pixels_stay_in_range() -> None:
    method = make_method(**VIT, normalize=False)
    assert method.normalization == ((0.0,) * 3, (1.0,) * 3), "evaluation must feed it the same pixels"
    images = method.augment(make_batch(range(12)), seed=7, step=0)["images"]
    assert images.min() >= 0 and images.max() <= 1


def test_drop_path_rows_follow_the_position_in_the_global_batch() -> None:
    method = make_method(**VIT, drop_path=0.4, group_size=4)
    whole = method.augment(make_batch(range(12)), seed=7, step=2)["keep"]  # [blocks, 2, rows] out of 24
    assert whole.shape == (2, 2, 3 * int(8 * 0.6))
    part = method.augment(make_batch(range(4, 8)), seed=7, step=2)["keep"]
    for block in range(2):
        for branch in range(2):
            mine = {int(r) % 12 + 12 * (int(r) // 12) for r in whole[block, branch] if 4 <= int(r) % 12 < 8}
            assert {int(r) % 4 + 4 + 12 * (int(r) // 4) for r in part[block, branch]} == mine
    assert not torch.equal(whole, method.augment(make_batch(range(12)), seed=7, step=3)["keep"])
    assert make_method(**VIT).augment(make_batch(range(12)), seed=7, step=2)["keep"] is None
