"""The pictures are the same every time, and comparing pixels does not tell their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from tests.quality.images import KINDS, SETS, SIZE, write_images


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted(folder.rglob("*.png"))
    return np.stack([np.asarray(Image.open(p)) for p in paths]), np.array([int(p.parent.name) for p in paths])


@pytest.mark.parametrize("name", SETS)
def test_pictures(tmp_path: Path, name: str) -> None:
    counts = {"train": 300, "val": 60}
    write_images(name, tmp_path / "a", counts=counts)
    (x, y), (queries, labels) = read(tmp_path / "a" / "train"), read(tmp_path / "a" / "val")
    assert x.shape == (300, SIZE, SIZE, 3) and (np.bincount(y) == 30).all() and (np.bincount(labels) == 6).all()
    assert len(np.unique(np.concatenate([x, queries]).reshape(360, -1), axis=0)) == 360
    neighbours = KNeighborsClassifier(5).fit(x.reshape(300, -1) / 255, y)
    assert neighbours.score(queries.reshape(60, -1) / 255, labels) < 4 / KINDS

    write_images(name, tmp_path / "b", counts={"train": 20, "val": 20})
    write_images(name, tmp_path / "c", counts={"train": 20, "val": 20}, seed=1)
    again, other = read(tmp_path / "b" / "train")[0], read(tmp_path / "c" / "train")[0]
    assert all((x == picture).all((1, 2, 3)).any() for picture in again)
    assert not any((x == picture).all((1, 2, 3)).any() for picture in other)
