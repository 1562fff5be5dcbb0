"""Runs that read a stream: what they do without, what they say about it, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scaler.batches import run_batch
from scaler.checkpoint import read_manifest
from scaler.collectives import World
from scaler.data import IndexedData, StreamData, open_data
from scaler.layout import Layout
from scaler.recipe import load_recipe
from scaler.train import main
from shards.convert import convert
from shards.decode import View
from tests.images import make_image_folder
from tests.runs import rows, write_recipe

SHORT = ["schedule.total=4 steps", "schedule.warmup=1 steps", "data.global_batch_size=8"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in a handful of shards."""
    folder = tmp_path_factory.mktemp("stream")
    make_image_folder(folder / "images", num_images=40, size=32)
    convert(folder / "images", folder / "shards", shard_size="20KB", workers=1)
    return folder / "shards"


def stream_recipe(path: Path, method: str, source: object, **data: Any) -> str:
    return str(write_recipe(path, method, shards=Path(str(source)), data={"reader": "stream", **data}))


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a start that fails."""
    capfd.readouterr()
    assert main(list(arguments)) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_stream_is_trained_on_and_resumed_approximately(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = f"{shards}/shard-{{000000..000002}}.tar"
    recipe = stream_recipe(tmp_path / "run.yaml", "simclr", source, lanes=3, cache_size="1GB")
    assert main([recipe, *SHORT, "run.stop_after=2 steps"]) == 0
    out = capfd.readouterr().out
    assert "a stream of images, global batch 8" in out and "a stream of 3 sources without an index" in out
    assert "warning: data.lanes and data.cache_size set, without effect: a stream has no index" in out
    assert "resuming is approximate" not in out
    run_dir = tmp_path / "run"
    assert read_manifest(run_dir / "checkpoints/step-00000002")["fingerprint"].startswith("stream:")
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["shards"] == source
    assert main([recipe, *SHORT]) == 0
    assert "warning: resuming is approximate: a stream is drawn anew" in capfd.readouterr().out
    table = rows(run_dir)
    assert [row["images"] for row in table] == [8, 16, 24, 32] and not any("epoch" in row for row in table)
    with pytest.raises(ValueError, match=r"reads a stream, whose steps cannot be looked up; index its shards"):
        run_batch(run_dir, step=1)
    other = stream_recipe(tmp_path / "run.yaml", "simclr", f"{shards}/shard-000000.tar", lanes=3, cache_size="1GB")
    assert "was trained on other data" in fails(capfd, other, *SHORT)


def test_labels_come_with_the_stream(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = f"{shards}/shard-{{000000..000002}}.tar"
    recipe = stream_recipe(tmp_path / "run.yaml", "supervised", source)
    assert main([recipe, *SHORT, "method.num_classes=3"]) == 0
    few = stream_recipe(tmp_path / "few.yaml", "supervised", source)
    assert "num_classes" in fails(capfd, few, *SHORT, "method.num_classes=2")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        (
            "SHARDS/shard-000000.tar",
            ["schedule.total=2 epochs", "checkpoint.every=1 epochs", "run.stop_after=1 epoch"],
            "a stream .* has no epochs, .*: give schedule.total=2 epochs, checkpoint.every=1 epochs, "
            "run.stop_after=1 epochs in steps or images",
        ),
        ("pipe:cat SHARDS/shard-000000.tar", [], r"is a command, .* set data\.allow_pipes=true"),
        ("SHARDS", [], "is no shard; name some, as .*/train-{000000..000099}.tar"),
        ("SHARDS/missing.tar", [], "cannot read shard .*missing.tar: .*No such file"),
    ],
)
def test_one_line_for_what_cannot_be(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, overrides: list[str], message: str
) -> None:
    recipe = stream_recipe(tmp_path / "run.yaml", "simclr", "x")
    values = yaml.safe_load(Path(recipe).read_text())
    values["data"]["shards"] = source.replace("SHARDS", str(shards))
    Path(recipe).write_text(yaml.safe_dump(values))
    line = fails(capfd, recipe, *SHORT, *overrides)
    assert re.search(message, line), line


def test_commands_are_run_for_those_who_allow_it(shards: Path, tmp_path: Path) -> None:
    recipe = stream_recipe(tmp_path / "run.yaml", "simclr", "x")
    source = f"pipe:cat {shards}/shard-000000.tar"
    assert main([recipe, *SHORT, f"data.shards={source}", "data.allow_pipes=true"]) == 0


def test_indexed_shards_say_that_pipes_have_no_effect(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path / "run.yaml", "simclr", shards=shards, data={"allow_pipes": True})))
    data = open_data(recipe)
    assert isinstance(data, IndexedData) and data.num_samples == 40
    notes = list(data.notes(layout=Layout(1, 8, 1), resumes=False))
    assert any("data.allow_pipes set, without effect: only data.reader=stream runs commands" in note for note in notes)


def test_several_sources_and_their_full_paths(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    recipe = load_recipe(stream_recipe(tmp_path / "run.yaml", "simclr", "x"))
    shown = "shard-{000000..000001}.tar::https://user:password@host/s.tar?signature=1"
    settings = recipe.data.model_copy(update={"shards": shown})
    data = open_data(recipe.model_copy(update={"data": settings}))
    assert isinstance(data, StreamData) and data.num_samples is None
    assert data.place == f"{shards}/shard-{{000000..000001}}.tar::https://host/s.tar"


def test_gpu_decoding_without_a_gpu_is_refused_before_training(shards, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = write_recipe(tmp_path / "recipe.yaml", "simclr", shards=shards, data={"decode": "gpu"})
    error = fails(capfd, str(recipe))
    assert "data.decode=gpu, but there is no CUDA device" in error and "set data.decode=cpu" in error
    assert not (tmp_path / "recipe" / "metrics.jsonl").exists()


def test_a_stream_is_not_decoded_by_a_gpu(shards, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data\.decode=gpu needs data\.reader=indexed.*set data\.decode=cpu"):
        load_recipe(stream_recipe(tmp_path / "recipe.yaml", "simclr", f"{shards}/x.tar", decode="gpu"))


def test_the_recipe_says_who_decodes(shards, tmp_path) -> None:
    for decode in ("cpu", "gpu"):
        recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml", "simclr", shards=shards, data={"decode": decode})))
        data, layout = open_data(recipe), Layout(ranks=1, micro_batch_size=8, num_micro_batches=1)
        loader = data.loader([View("v", 16)], batch_size=8, layout=layout, world=World(), start=0, stop=8)
        (batch,) = loader
        assert ("encoded" in batch) == (decode == "gpu")
