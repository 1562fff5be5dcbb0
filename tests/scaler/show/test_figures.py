"""Pictures: what is drawn, read back from the figure's own data, and the PNG from its pixels."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA

from scaler.show import figures
from scaler.show.figures import demo_figure, embedding_picture, loss_curves
from scaler.show.projections import plane, principal_components


def write_metrics(path: Path, losses: list[float | None]) -> Path:
    path.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, 1)))
    return path


@pytest.mark.parametrize(("n", "dim"), [(50, 8), (6, 20), (3000, 3)])
def test_principal_components_match_scikit_learn(n: int, dim: int) -> None:
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(n)) * torch.arange(1, dim + 1)
    expected = PCA(n_components=2, svd_solver="full").fit_transform(features.double().numpy())
    got = principal_components(features, num=2).numpy()
    np.testing.assert_allclose(np.abs(got), np.abs(expected), rtol=1e-9, atol=1e-9)
    assert (got[np.abs(got).argmax(axis=0), [0, 1]] > 0).all()
    np.testing.assert_allclose(principal_components(features * -1, num=2).numpy().std(axis=0), got.std(axis=0))


def test_missing_components_are_zero() -> None:
    got = principal_components(torch.tensor([[1.0], [3.0]]), num=2)
    assert got[:, 1].tolist() == [0.0, 0.0] and got[:, 0].abs().tolist() == [1.0, 1.0]


def test_neighbours_stay_neighbours_in_the_plane() -> None:
    """Ten clusters in forty dimensions, of which two principal components cannot tell more than three apart."""
    labels = torch.arange(200) % 10
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.one_hot(labels, 40).float() + 0.1 * noise
    points = plane(features)
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(dim=1)
    assert (labels[nearest] == labels).float().mean() > 0.95
    assert torch.equal(points, plane(features)), "the same picture each time"
    assert plane(features[:3]).shape == (3, 2)


def test_loss_curves_draw_every_row_and_leave_gaps(tmp_path: Path) -> None:
    axes = Figure().subplots()
    loss_curves(axes, {"a": write_metrics(tmp_path / "a", [3.0, None, 1.0]), "b": write_metrics(tmp_path / "b", [2.0])})
    a, b = axes.get_lines()
    assert list(a.get_xdata()) == [1, 2, 3] and list(b.get_ydata()) == [2.0]
    assert a.get_ydata()[0] == 3.0 and math.isnan(a.get_ydata()[1])
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_a_run_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no row"):
        loss_curves(Figure().subplots(), {"a": write_metrics(tmp_path / "a", [])})


def test_embedding_picture_shows_each_class_in_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_MAX_POINTS", 150)
    axes = Figure().subplots()
    labels = torch.arange(900) % 3
    features = torch.nn.functional.one_hot(labels, 3).float() + 0.01 * torch.randn(900, 3)
    embedding_picture(axes, features, labels)
    groups = axes.collections
    assert len(groups) == 3 and len({tuple(group.get_facecolor()[0]) for group in groups}) == 3
    assert sum(len(group.get_offsets()) for group in groups) == 150
    centers = [np.asarray(group.get_offsets()).mean(axis=0) for group in groups]
    spread = max(np.asarray(group.get_offsets()).std() for group in groups)
    assert min(np.linalg.norm(centers[i] - centers[i - 1]) for i in range(3)) > spread
    with pytest.raises(ValueError, match=r"\[5, 3\] and labels \[4\]"):
        embedding_picture(axes, torch.ones(5, 3), torch.ones(4, dtype=torch.int64))


def test_demo_figure_is_one_png_without_pyplot(tmp_path: Path) -> None:
    runs = {name: write_metrics(tmp_path / name, [2.0, 1.0]) for name in ("dinov2", "simclr")}
    data = (torch.randn(40, 5), torch.arange(40) % 4)
    embeddings = {"dinov2": {"before: 20 %": data, "after: 90 %": data}, "simclr": {"after": data}}
    loaded = "matplotlib.pyplot" in sys.modules
    demo_figure(tmp_path / "demo.png", runs=runs, embeddings=embeddings, title="demo")
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    pixels = np.asarray(Image.open(tmp_path / "demo.png").convert("L"))
    height, width = pixels.shape
    assert width > 1200 and height > 700
    cells = [cell for row in np.array_split(pixels, 2) for cell in np.array_split(row, 3, axis=1)]
    assert [bool((cell[60:-60, 60:-60] < 200).sum() > 200) for cell in cells] == [True, True, True, True, True, False]
