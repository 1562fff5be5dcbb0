"""Patch features as colours: the right features, scikit-learn's components, the same axes for all images."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA

from scaler.evals.checkpoints import EvaluationModel
from scaler.show.features import component_colors, feature_sheet, patch_features
from scaler.show.pixels import load_images, spread
from shards.index import ShardIndex
from tests.scaler.show.conftest import make_model

PIXELS = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NORMALISED = (PIXELS / 255 - 0.5) / 0.25


def test_colours_are_scikit_learns_components_of_all_images() -> None:
    features = torch.randn(4, 5, 6, 20, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 21)
    flat = features.flatten(0, 2).double().numpy()
    expected = PCA(n_components=3, svd_solver="full").fit_transform(flat)
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), range(3)])  # an axis may point either way
    low, high = np.quantile(expected, [0.01, 0.99], axis=0)
    wanted = ((expected - low) / (high - low)).clip(0, 1).reshape(4, 5, 6, 3)
    np.testing.assert_allclose(component_colors(features, foreground=False).numpy(), wanted, atol=1e-6)


def test_the_foreground_is_what_the_border_is_not() -> None:
    """A block of other features in the middle of each image: it alone is coloured, by components of its own."""
    noise = torch.randn(3, 9, 9, 8, generator=torch.Generator().manual_seed(2))
    features = 0.1 * noise
    features[:, 2:7, 3:8, 0] += 5.0
    for sign in (1, -1):
        colors = component_colors(sign * features, foreground=True)
        inside = torch.zeros(3, 9, 9, dtype=torch.bool)
        inside[:, 2:7, 3:8] = True
        assert (colors[~inside] == 0).all() and (colors[inside].amax(dim=-1) > 0).all()
        alone = component_colors((sign * features)[inside][None, None], foreground=False)[0, 0]
        assert torch.equal(colors[inside], alone)


def test_patches_of_a_vit_without_class_and_registers(vit: EvaluationModel) -> None:
    """Twice the size that it was made for: positions are interpolated, and the grid is in the order of the pixels."""
    maps = patch_features(vit, PIXELS, batch_size=2)
    assert maps.shape == (3, 8, 8, 36)
    backbone = vit.method.evaluated_backbone()
    with torch.no_grad():
        x = backbone.embed(NORMALISED)
        assert x.shape[1] == 1 + 2 + 64
        for block in backbone.blocks:
            x = block(x.flatten(0, 1), [(3, 67)]).view_as(x)
        expected = backbone.norm(x)[:, 3:]
    torch.testing.assert_close(maps.flatten(1, 2), expected)


def test_the_last_map_of_a_cnn(index: ShardIndex) -> None:
    model = make_model("test_resnet", image_size=64)
    maps = patch_features(model, PIXELS)
    torch.manual_seed(0)
    reference = timm.create_model("test_resnet", num_classes=0).eval()
    reference.load_state_dict(model.method.evaluated_backbone().model.state_dict())
    with torch.no_grad():
        expected = reference.forward_features(NORMALISED).permute(0, 2, 3, 1)
    torch.testing.assert_close(maps, expected)
    sheet = feature_sheet(model, index, num=3)
    assert np.asarray(sheet).std() > 10


def test_the_sheet_shows_images_above_their_features(vit: EvaluationModel, index: ShardIndex) -> None:
    """Ten images, of which one cannot be decoded: nine pairs, eight of them in the first two rows."""
    with pytest.warns(UserWarning, match="1 of 30 images cannot be decoded"):
        images = load_images(index, spread(index, 30), image_size=32)
    assert len(images.keys) == 29 and len(set(images.ids.tolist())) == 29
    assert spread(index, 7).tolist() == [0, 4, 8, 12, 17, 21, 25] and len(spread(index, 99)) == 30
    with pytest.warns(UserWarning, match="cannot be decoded"):
        sheet = np.asarray(feature_sheet(vit, index, num=30, foreground=True, what="vit")).astype(int)
    cells = [sheet[top : top + 224, 20 + 240 * c : 244 + 240 * c] for top in rows_of(sheet) for c in range(8)]
    filled = [cell for cell in cells if cell.min() < 250]
    assert len(filled) == 2 * 29
    with pytest.raises(ValueError, match="none of 1 images can be decoded"):
        load_images(index, bad_id(index), image_size=32)


def rows_of(sheet: np.ndarray) -> list[int]:
    """The tops of the rows of pictures: where much that is not white begins."""
    dark = (sheet[:, 20:244].min(axis=-1) < 250).mean(axis=1) > 0.95
    return [row for row in np.flatnonzero(dark).tolist() if not dark[row - 1]]


def bad_id(index: ShardIndex) -> np.ndarray:
    (key,) = [id_ for id_ in range(30) if index.entry(id_).size == 900]
    return np.array([key])
