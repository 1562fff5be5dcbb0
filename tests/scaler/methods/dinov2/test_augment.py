"""Views, colours, masks and kept rows of a step: the recipe's table, and the same on every layout."""

from __future__ import annotations

import pytest
import torch

from scaler.methods.dinov2.augment import drop_path_rows, make_colors, make_views, mask_tensors
from scaler.methods.dinov2.settings import Settings
from scaler.nn.color import sample_color
from tests.scaler.methods.dinov2.tiny import loader_batch, micro_batches, tiny_method, tiny_settings


def test_views_are_the_recipes() -> None:
    views = {view.name: view for view in make_views(Settings(), image_size=224)}
    assert list(views) == ["global_1", "global_2", "local"]
    for name in ("global_1", "global_2"):
        assert (views[name].size, views[name].count, views[name].scale) == (224, 1, (0.32, 1.0))
    assert (views["local"].size, views["local"].count, views["local"].scale) == (96, 8, (0.05, 0.32))
    assert all(v.flip == 0.5 and v.interpolation == "bicubic" for v in views.values())
    assert len(make_views(Settings(num_local_crops=0), image_size=224)) == 2
    assert {view.flip for view in make_views(Settings(flip=0.0), image_size=224)} == {0.0}


@pytest.mark.parametrize(("blur", "expected"), [("paper", (1.0, 0.1, 0.5)), ("released", (0.0, 0.9, 0.5))])
def test_colors_are_the_recipes_and_the_blur_has_two_names(blur: str, expected: tuple[float, ...]) -> None:
    colors = make_colors(Settings(blur=blur))
    m = 4000
    for (name, color), probability in zip(colors.items(), expected, strict=True):
        assert (color.brightness, color.contrast, color.saturation, color.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (color.jitter_p, color.grayscale_p, color.blur_kernel, color.blur_sigma) == (0.8, 0.2, 9, (0.1, 2.0))
        drawn = sample_color(
            color, seed=0, epochs=torch.zeros(m, dtype=torch.int64), ids=torch.arange(m), view=name, copy=0
        )
        assert abs((drawn.sigma > 0).mean() - probability) < 0.04
        assert abs(drawn.solarize.mean() - (0.2 if name == "global_2" else 0.0)) < 0.04
        assert drawn.solarize_threshold == 128


def test_crop_batches_are_crop_major_and_equal_on_every_layout() -> None:
    method = tiny_method()
    whole = micro_batches(method, [0, 16])[0]
    assert [tuple(c.shape) for c in whole["crops"]] == [(32, 3, 32, 32), (48, 3, 16, 16)]
    for start, part in zip(range(0, 16, 4), micro_batches(method, [0, 4, 8, 12, 16]), strict=True):
        rows = slice(start, start + 4)
        for copies, whole_crops, crops in zip((2, 3), whole["crops"], part["crops"], strict=True):
            expected = whole_crops.view(copies, 16, *crops.shape[1:])[:, rows]
            torch.testing.assert_close(crops.view(expected.shape), expected)
        assert torch.equal(part["masks"].view(2, 4, -1), whole["masks"].view(2, 16, -1)[:, rows])
    local = whole["crops"][1].view(3, 16, -1)
    assert not torch.equal(local[0], local[1])  # copies differ


def test_no_local_crops_leave_one_crop_batch() -> None:
    method = tiny_method(num_local_crops=0)
    batch = method.augment(loader_batch(method, rows=slice(0, 16)), seed=0, step=0)
    assert len(batch["crops"]) == 1 and len(batch["keep"]) == 1


def test_masked_positions_and_weights_follow_from_the_masks() -> None:
    out = mask_tensors(torch.arange(8), tiny_settings(), global_batch_size=8, grid=(4, 4), seed=0, step=1)
    masks, expected_masked, expected_weights = out["masks"], [], []
    for crop in range(16):
        tokens = [j for j in range(16) if masks[crop, j]]
        expected_masked += [crop * 16 + j for j in tokens]
        expected_weights += [1 / len(tokens) for _ in tokens]
    assert out["masked"].tolist() == expected_masked
    torch.testing.assert_close(out["mask_weights"], torch.tensor(expected_weights))
    assert 0 < int((masks.sum(dim=1) > 0).sum()) <= 8


def test_steps_and_seeds_change_masks_and_rows() -> None:
    method = tiny_method()
    raw = loader_batch(method, rows=slice(0, 16))
    first, again, other = (method.augment(raw, seed=0, step=step) for step in (0, 0, 1))
    assert torch.equal(first["masks"], again["masks"]) and torch.equal(first["keep"][1], again["keep"][1])
    assert not torch.equal(first["masks"], other["masks"]) and not torch.equal(first["keep"][1], other["keep"][1])
    assert not torch.equal(first["masks"], method.augment(raw, seed=1, step=0)["masks"])


def test_kept_rows_have_the_share_and_no_drop_path_gives_none() -> None:
    keep = drop_path_rows(torch.arange(16), tiny_settings(), num_blocks=2, seed=0, step=0)
    assert keep is not None
    # 4 groups; int(2 · 4 · 0.7) = 5 of the global, int(3 · 4 · 0.7) = 8 of the local rows of each
    assert [tuple(k.shape) for k in keep] == [(2, 2, 20), (2, 2, 32)]
    assert drop_path_rows(torch.arange(16), tiny_settings(drop_path=0.0), num_blocks=2, seed=0, step=0) is None
