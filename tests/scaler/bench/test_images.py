"""The made pictures: of the size that is asked for, and the same from the same seed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from scaler.bench.images import make_folder, photo


@pytest.mark.parametrize(("width", "height", "wanted"), [(500, 375, 110_000), (96, 72, 6_700)])
def test_files_have_the_size_that_is_asked_for(width: int, height: int, wanted: int) -> None:
    data = photo(width, height, num_bytes=wanted, quality=92, seed=3)
    assert abs(len(data) / wanted - 1) < 0.05
    assert Image.open(io.BytesIO(data)).size == (width, height)
    assert data == photo(width, height, num_bytes=wanted, quality=92, seed=3)


def test_a_folder_has_classes_and_upright_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path / "made", num_images=70, num_bytes=2_000, width=48, height=36)
    files = sorted((tmp_path / "made").rglob("*.jpg"))
    assert len(files) == 70 and len({file.parent for file in files}) == 10
    assert {Image.open(file).size for file in files} == {(48, 36), (36, 48)}
    assert len({file.read_bytes() for file in files}) == 64
