"""`scaler eval`: what it prints and keeps, from shards and from folders of images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from scaler.cli import app
from scaler.collectives import World
from scaler.evals.checkpoints import load_for_evaluation
from scaler.evals.features import Part
from scaler.evals.images import open_images
from scaler.evals.linear import linear_scores
from scaler.evals.scores import mean_scores
from scaler.train import main
from shards.convert import convert
from shards.decode import View
from tests.http import faulty_server
from tests.images import make_image_folder
from tests.long import only_long
from tests.runs import write_recipe

CLASSES = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` as class folders, of which `val` lacks the first class; `shards` of the former."""
    folder = tmp_path_factory.mktemp("photos")
    make_image_folder(folder / "train", num_images=60, classes=CLASSES, size=40, format="png", seed=1)
    make_image_folder(folder / "val", num_images=30, classes=CLASSES, size=40, format="png", seed=2)
    for file in (folder / "val" / "class_0").iterdir():
        file.unlink()
    (folder / "val" / "class_0").rmdir()
    convert(folder / "train", folder / "shards", workers=1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


VIT = ["timm:test_vit", "--random-init", "--image-size", 32, "--device", "cpu"]


def test_knn_of_folders_and_what_a_second_evaluation_takes_from_the_first(
    photos: Path, cache: Path, tmp_path: Path
) -> None:
    words = ["knn", *VIT, "--train", photos / "train", "--val", photos / "val", "--k", "5,1,60", "--json"]
    first = run(*words, "--out", tmp_path / "first.json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert record == json.loads((tmp_path / "first.json").read_text())
    assert [row["k"] for row in record["table"]] == [5, 1, 60]
    assert (record["k"], record["top1"]) == (5, record["table"][0]["top1"])
    assert (record["train_samples"], record["val_samples"], record["step"]) == (60, 20, 0)
    assert record["images_per_second"] > 0 and "60 of 60 images" in first.stderr

    model = load_for_evaluation("timm:test_vit", random_init=True, image_size=32, device="cpu")
    by_hand = model.knn(open_images(photos / "shards"), open_images(photos / "val"), k=5)
    assert by_hand == {key: record[key] for key in ("top1", "top5")}
    assert record["weights_sha256"] == model.sha256

    again, anew = run(*words), run(*words, "--no-cache")
    assert json.loads(again.stdout)["images_per_second"] is None
    assert f"features of {photos / 'val'}: all 20 kept from an earlier evaluation" in again.stderr
    assert "20 of 20 images" in anew.stderr
    for result in (again, anew):
        assert json.loads(result.stdout)["table"] == record["table"]
    (images,) = {path.parent for path in cache.rglob("evaluations/images")}
    assert len(list((images / "images").iterdir())) == 2 and len(list((images / "features").iterdir())) == 2
    bf16 = run(*words, "--precision", "bf16", "--k", 3)
    assert bf16.exit_code == 0 and "60 of 60 images" in bf16.stderr, "other numbers, other features"


def test_linear_chooses_from_a_grid_of_rates_and_layers(photos: Path, tmp_path: Path) -> None:
    words = ["linear", *VIT, "--train", photos / "shards", "--val", photos / "val", "--min-steps", 20, "--epochs", 1]
    result = run(*words, "--out", tmp_path / "linear.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "linear.json").read_text())
    model = load_for_evaluation("timm:test_vit", random_init=True, image_size=32, device="cpu")
    depth = min(4, len(model.method.evaluated_backbone().blocks()))
    names = ["1 block", "1 block + patches", f"{depth} blocks", f"{depth} blocks + patches"]
    assert {row["input"] for row in record["table"]} == set(names)
    assert len(record["table"]) == 4 * 16 and record["table"][0]["input"] == record["input"]
    assert all(name in result.output for name in names) and "←" in result.output

    parts = [model.extract(open_images(photos / part), layers=True).part for part in ("shards", "val")]
    d = model.method.evaluated_backbone().num_features
    assert parts[0].features.shape[1] == (depth + 1) * d
    pooled = Part(*parts[0][:2], model.features(open_images(photos / "shards"))[0])
    torch.testing.assert_close(parts[0].features[:, model.layer_inputs()["1 block"]], pooled.features)
    parts[1] = parts[1]._replace(labels=parts[1].labels + 1)  # the class that the validation folder lacks
    by_hand = linear_scores(*parts, inputs=model.layer_inputs(), num_classes=CLASSES, min_steps=20, epochs=1.0)
    assert by_hand.scores == pytest.approx({key: record[key] for key in ("top1", "top5", "loss")}, rel=1e-4)


def test_the_classifier_of_a_run_and_where_records_are_kept(photos: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "run.yaml", "supervised_cnn", shards=photos / "shards",
        data={"global_batch_size": 8}, schedule={"total": "3 steps", "warmup": "1 steps"},
    )  # fmt: skip
    assert main([str(recipe)]) == 0
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    result = run("classifier", checkpoint, "--val", photos / "val", "--crop-fraction", 0.9, "--device", "cpu")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "run" / "evaluations").iterdir()
    record = json.loads(file.read_text())
    assert file.name.startswith("classifier-step-00000003-") and str(file) in result.output.replace("\n", "")
    model = load_for_evaluation(tmp_path / "run", device="cpu")
    by_hand, _ = mean_scores(
        model.method.evaluate, open_images(photos / "val"), world=World(), device=torch.device("cpu"),
        normalization=model.method.normalization, to_label=torch.tensor([1, 2]), batch_size=7,
        view=View("x", 32, kind="center", crop_fraction=0.9),
    )  # fmt: skip
    assert {key: record[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-5)
    assert 0 <= record["top1"] <= 1 and record["loss"] > 0

    for _ in range(2):
        assert run("knn", tmp_path / "run", "--train", photos / "shards", "--val", photos / "val").exit_code == 0
    assert len(list((tmp_path / "run" / "evaluations").iterdir())) == 3, "one file each"


def test_shards_of_a_url_are_kept_apart_from_features(photos: Path, tmp_path: Path) -> None:
    with faulty_server(photos) as server:
        url = f"{server.url}/shards"
        words = ["knn", *VIT, "--train", url, "--val", photos / "val", "--json", "--out", tmp_path / "out.json"]
        words += ["--shard-cache-dir", tmp_path / "shards", "--cache-dir", tmp_path / "features"]
        remote = run(*words)
        assert remote.exit_code == 0, remote.output
        assert list((tmp_path / "shards").iterdir())
        shutil.rmtree(tmp_path / "shards")
        again = run(*words)
    local = run(*["knn", *VIT, "--train", photos / "shards", "--val", photos / "val", "--json"])
    assert json.loads(again.stdout)["images_per_second"] is None, "kept features need no shard"
    assert not list((tmp_path / "shards").glob("*.tar"))
    assert json.loads(remote.stdout)["table"] == json.loads(local.stdout)["table"]
    assert json.loads(remote.stdout)["train"] == url
    assert list((tmp_path / "features").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "train", "--val", "other"], "labels of the same classes are needed: .* has no 'cats'"),
        (["--train", "flat", "--val", "val"], "labels of the same classes are needed: .* has 0 classes"),
        (["--train", "train", "--val", "val", "--k", "61"], "k is 61, .* 60 training samples; lower k"),
        (["--train", "train", "--val", "val", "--k", "many"], "--k is 'many'; give a number"),
        (["--train", "train", "--val", "val", "--precision", "fp8"], "--precision is 'fp8'; it is fp32 or bf16"),
        (["--train", "train", "--val", "val", "--crop-fraction", "1.5"], "--crop-fraction is 1.5; it lies above 0"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(photos: Path, tmp_path: Path, words: list[str], message: str) -> None:
    make_image_folder(tmp_path / "flat", num_images=5, classes=0, size=40, format="png")
    make_image_folder(tmp_path / "other" / "cats", num_images=5, classes=0, size=40, format="png")
    places = {"train": photos / "train", "val": photos / "val", "flat": tmp_path / "flat", "other": tmp_path / "other"}
    result = run("knn", *VIT, *(places.get(word, word) for word in words))
    assert isinstance(result.exception, ValueError) and len(str(result.exception).splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        raise result.exception


@only_long
def test_two_processes_give_the_record_of_one(photos: Path, tmp_path: Path) -> None:
    def command(*words: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "scaler.cli", "eval", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)

    words = ["--train", photos / "train", "--val", photos / "val", "--json", "--cache-dir", tmp_path / "kept"]
    for what in (["knn", "--k", "3,1"], ["linear", "--min-steps", 50]):
        many, one = (command(what[0], *VIT, *words, *what[1:], "--processes", n) for n in (2, 1))
        assert many.returncode == one.returncode == 0, many.stderr + one.stderr
        first, second = (json.loads(result.stdout) for result in (many, one))
        assert first["processes"] == 2 and second["images_per_second"] is None
        assert [row["top1"] for row in second["table"]] == [row["top1"] for row in first["table"]]
        assert second["top5"] == first["top5"]
    wrong = command("knn", "MISSING", *words, "--processes", 2)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert {line[:14] for line in wrong.stderr.splitlines() if "SIGTERM" not in line} == {"error: MISSING"}, (
        wrong.stderr
    )
