"""Whole runs whose checkpoints lie elsewhere than in the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from scaler.checkpoint import complete_checkpoints, load_pieces, read_manifest
from scaler.strategies.base import Piece
from scaler.train import main
from shards.convert import convert
from tests.images import make_image_folder
from tests.scaler.test_cli import RECIPE, scaler


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of SimCLR on 23 images."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_image_folder(folder / "photos", num_images=23, format="png")
    convert(folder / "photos", folder / "shards", workers=1)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "shards": str(folder / "shards")}}))
    return path


def train(recipe: Path, run_dir: Path, *words: str) -> None:
    assert main([str(recipe), f"run.dir={run_dir}", "run.deterministic=true", *words]) == 0


def state(where: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors = read_manifest(where)["tensors"]
    pieces = {
        name: Piece(torch.empty(shape).view(-1), 0, tuple(shape), copy=0, copies=1)
        for name, shape in ((name, entry["shape"]) for name, entry in tensors.items())
    }
    load_pieces(where, pieces)
    return {name: piece.data for name, piece in pieces.items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_from_a_url_and_another_starts_from_it(recipe: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/checkpoints"
    train(recipe, tmp_path / "unbroken")
    wanted = state(complete_checkpoints(tmp_path / "unbroken" / "checkpoints")[0])
    train(recipe, tmp_path / "run", f"checkpoint.dir={url}", "run.stop_after=2 steps")
    assert [str(p) for p in complete_checkpoints(url)] == [f"{url}/step-00000002"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Another run starts from it, by its URL, and keeps its own inside.
    train(recipe, tmp_path / "other", f"checkpoint.resume={url}")
    assert same(state(complete_checkpoints(tmp_path / "other" / "checkpoints")[0]), wanted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4]
    # The first goes on.
    train(recipe, tmp_path / "run", f"checkpoint.dir={url}")
    assert same(state(f"{url}/step-00000004"), wanted)
    # Commands that are given the run find them.
    shown = json.loads(scaler("checkpoint", "show", tmp_path / "run", "--json").stdout)
    assert shown["checkpoint"] == f"{url}/step-00000004" and shown["step"] == 4
    assert scaler("checkpoint", "convert", tmp_path / "run", "memory://copies/a").returncode == 0
    assert same(state("memory://copies/a"), wanted)
    fsspec.filesystem("memory").rm("/copies", recursive=True)


def test_a_relative_folder_is_found_from_anywhere(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(recipe, Path("run"), "checkpoint.dir=kept/here", "run.stop_after=1 steps")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    shown = json.loads(scaler("checkpoint", "show", "../run", "--json").stdout)
    assert shown["checkpoint"] == str(tmp_path / "kept" / "here" / "step-00000001")
