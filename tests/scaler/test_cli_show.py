"""`scaler show …` as a user meets it: from a folder of images, with random weights, and wrong use in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.images import make_image_folder
from tests.scaler.test_cli import scaler

MODEL = ("timm:test_vit", "--random-init", "--image-size", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_image_folder(folder, num_images=12)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(
    "words",
    [
        ("augmentations", "dinov2/demo", "--images", "PHOTOS", "--num", "2"),
        ("features", *MODEL, "PHOTOS", "--num", "3", "--foreground"),
        ("attention", *MODEL, "PHOTOS", "--num", "2"),
        ("embedding", *MODEL, "PHOTOS", "--num", "12"),
        ("neighbours", *MODEL, "--train", "PHOTOS", "--val", "PHOTOS", "--num", "2", "--k", "3"),
    ],
    ids=lambda words: words[0],
)
def test_pictures_from_a_folder_of_images(words: tuple[str, ...], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    result = scaler("show", *[str(photos) if word == "PHOTOS" else word for word in words], "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out)
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("augmentations", "dinov2/demo", "--out", "x.jpg"), 2, "end the name in .png"),
        (("augmentations", "dinov2/dem"), 2, "did you mean 'dinov2/demo'"),
        (("augmentations", "dinov2/demo", "data.reader=stream"), 1, "reads a stream"),
        (("augmentations", "dinov2/demo", "data.shards=MISSING"), 1, "MISSING is no folder"),
        (("features", *MODEL, "MISSING"), 1, "MISSING is no folder"),
        (("attention", "timm:test_resnet", "--random-init", "PHOTOS"), 1, "only plain ViTs"),
        (("neighbours", *MODEL, "--train", "PHOTOS", "--val", "PHOTOS", "--k", "99"), 1, "99 neighbours are more"),
        (("embedding", *MODEL, "PHOTOS", "--out", "no/such/folder.png"), 2, "there is no folder no/such"),
        (("run", "MISSING"), 1, "MISSING is no folder"),
        (("run", "PHOTOS", "--out", "report.pdf"), 2, "end the name in .html"),
    ],
)
def test_wrong_use_is_one_line(
    words: tuple[str, ...], code: int, message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = scaler("show", *[str(photos) if word == "PHOTOS" else word for word in words])
    assert result.returncode == code and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_report_of_a_run_that_never_began(photos: Path, tmp_path: Path) -> None:
    result = scaler("show", "run", photos, "--out", tmp_path / "report.html")
    assert result.returncode == 0 and "holds neither recipe.yaml nor metrics.jsonl" in result.stdout
    assert "None of these runs has logged a step yet" in (tmp_path / "report.html").read_text()
