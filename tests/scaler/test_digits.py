"""The demo's images: the same everywhere, every scan once, recognisable, and not solved by pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from scaler.digits import SIZE, paint, write_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert write_digits(folder) == {"train": 1437, "val": 360}
    return folder


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted(folder.glob("*/*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]), np.array([int(p.parent.name) for p in paths])


def test_every_scan_is_written_once_in_the_folder_of_its_class(folder: Path) -> None:
    paths = list(folder.glob("*/*/*.png"))
    assert sorted(int(path.stem) for path in paths) == list(range(1797))
    target = load_digits().target
    assert all(target[int(path.stem)] == int(path.parent.name) for path in paths)
    assert {len(list(folder.glob(f"val/{label}/*"))) > 20 for label in range(10)} == {True}


def test_writing_again_gives_the_same_files_and_removes_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "stray.png").touch()
    write_digits(tmp_path)

    def digest(root: Path) -> str:
        parts = (str(p.relative_to(root)).encode() + p.read_bytes() for p in sorted(root.glob("*/*/*")))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    assert digest(tmp_path) == digest(folder)


def test_the_digit_is_in_the_picture() -> None:
    """Where there is full ink the picture has one colour, which differs in brightness from what is around it."""
    scans = load_digits().images / 16
    for number in range(0, 1797, 60):
        picture = paint(scans[number], number=number).astype(float)
        blank = paint(np.zeros((8, 8)), number=number).astype(float)
        assert picture.shape == (SIZE, SIZE, 3)
        difference = np.abs(picture - blank).sum(axis=2)
        rows, _ = np.nonzero(difference > 60)
        assert 8 <= np.ptp(rows) + 1 <= SIZE and len(rows) > 20
        full = np.unravel_index(difference.argmax(), difference.shape)
        luma = np.array([0.299, 0.587, 0.114])
        assert abs((picture[full] - blank[full]) @ luma) > 20


def test_pixels_alone_do_not_solve_the_task_and_the_scans_themselves_do(folder: Path) -> None:
    (x, y), (queries, labels) = read(folder / "train"), read(folder / "val")
    pixels = KNeighborsClassifier(20, metric="cosine").fit(x.reshape(len(x), -1) / 255, y)
    assert pixels.score(queries.reshape(len(queries), -1) / 255, labels) < 0.35
    data = load_digits()
    val = np.array(sorted(int(path.stem) for path in folder.glob("val/*/*.png")))
    train = np.setdiff1d(np.arange(1797), val)
    scans = KNeighborsClassifier(20).fit(data.data[train], data.target[train])
    assert scans.score(data.data[val], data.target[val]) > 0.9
