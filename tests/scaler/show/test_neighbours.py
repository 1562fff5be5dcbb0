"""Nearest images, and images at their places on a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaler.evals.checkpoints import EvaluationModel
from scaler.show.embedding import embedding_map, on_grid
from scaler.show.neighbours import nearest_images, neighbour_sheet
from scaler.show.pixels import load_images
from scaler.show.sheet import RIGHT, WRONG
from shards.index import ShardIndex

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be decoded")


@pytest.mark.parametrize("leave_out", [False, True])
def test_neighbours_are_those_of_the_definition(vit: EvaluationModel, index: ShardIndex, leave_out: bool) -> None:
    """Cosines in float64 of all pairs, sorted."""
    every = load_images(index, np.arange(30), image_size=32, crop_fraction=0.875)
    with torch.no_grad():
        x = vit.method.features((every.pixels / 255 - 0.5) / 0.25).double()
    x /= x.norm(dim=1, keepdim=True)
    cosines = x @ x.T
    if leave_out:
        cosines.fill_diagonal_(-2)
    expected = cosines.sort(dim=1, descending=True, stable=True)
    queries = load_images(index, np.array([2, 11, 29]), image_size=32, crop_fraction=0.875)
    similarity, ids = nearest_images(vit, index, queries, k=6, leave_out=leave_out, crop_fraction=0.875)
    rows = [every.ids.tolist().index(id_) for id_ in queries.ids.tolist()]
    assert torch.equal(ids, every.ids[expected.indices[rows, :6]])
    torch.testing.assert_close(similarity, expected.values[rows, :6], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="99 neighbours are more than the"):
        nearest_images(vit, index, queries, k=99, leave_out=leave_out)


def test_neighbours_are_framed_by_their_class(vit: EvaluationModel, index: ShardIndex) -> None:
    """As many frames of each colour as there are neighbours of the same and of other classes."""
    pixels = np.asarray(neighbour_sheet(vit, index, index, num=4, k=5, what="vit"))
    queries = load_images(index, np.array([0, 7, 15, 22]), image_size=32, crop_fraction=0.875)
    _, ids = nearest_images(vit, index, queries, k=5, leave_out=True)
    same = (torch.from_numpy(index.labels(ids.numpy())) == queries.labels[:, None]).sum()
    counts = [(pixels == tuple(bytes.fromhex(color[1:]))).all(axis=-1).sum() for color in (RIGHT, WRONG)]
    frame = (128 + 8) ** 2 - 128**2
    assert counts == [int(same) * frame, (ids.numel() - int(same)) * frame]


@given(
    points=st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), max_size=60),
    num_cells=st.integers(1, 9),
    reach=st.integers(0, 3),
)
def test_no_picture_lies_on_another(points: list[tuple[float, float]], num_cells: int, reach: int) -> None:
    exact = np.array(points, dtype=np.float32).reshape(-1, 2)
    cells = on_grid(exact, num_cells=num_cells, reach=reach)
    placed = cells[cells[:, 0] >= 0]
    assert len({tuple(cell) for cell in placed.tolist()}) == len(placed)
    assert ((cells >= -1) & (cells < num_cells)).all()
    far = np.abs(cells - exact * (num_cells - 1))[cells[:, 0] >= 0]
    assert (far <= reach + 0.5 + 1e-6).all()
    if num_cells <= reach + 1:  # every cell can be reached from everywhere
        assert len(placed) == min(len(points), num_cells**2)


def test_the_map_shows_every_image_in_the_colour_of_its_class(vit: EvaluationModel, index: ShardIndex) -> None:
    """29 pictures of 112 pixels with frames of 3, in three colours, and a legend; no two of them overlap."""
    pixels = np.asarray(embedding_map(vit, index, num=30, what="vit"))
    sizes = []
    for color in ("#1f77b4", "#ff7f0e", "#2ca02c"):
        frames = (pixels[:, :1432] == tuple(bytes.fromhex(color[1:]))).all(axis=-1).sum()
        sizes.append(frames / (111**2 - 105**2))
        assert (pixels[64:, 1432:] == tuple(bytes.fromhex(color[1:]))).all(axis=-1).sum() == 15 * 15
    assert [round(size) for size in sizes] == [10, 10, 10] or sorted(round(size) for size in sizes) == [9, 10, 10]
    assert np.allclose(sizes, np.round(sizes), atol=0.02)
