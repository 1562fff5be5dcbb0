"""`scaler bench loader`: every row really runs, on a made set, on a folder and on shards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scaler.bench.contenders import KERNEL, LIBRARY, STOCK, Augmentation
from scaler.bench.loader import as_lines, as_table, measure
from shards import resize
from shards.convert import convert
from tests.images import make_image_folder
from tests.scaler.test_cli import scaler

QUICK: dict[str, Any] = {"seconds": 0.001, "rounds": 2}


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["part"], row["name"]): row for row in json.loads(json.dumps(result))["rows"]}


def test_every_row_is_measured_on_a_made_set() -> None:
    said: list[str] = []
    result = measure(
        None, views="simclr/demo", images=12, peers=["webdataset"], appetite=100.0, say=said.append, **QUICK
    )
    rows = rows_of(result)
    for part, row in rows.items():
        if "missing" in row:
            assert part[1] == KERNEL and resize.cut is resize.cut_with_torch
            continue
        assert len(row["blocks"]) == 2 and row["images_per_cpu_second"] > 0 < row["images_per_second"]
    assert {part for part, _ in rows} == {"everything", "worker", "colours", "decode", "raw"}
    assert set(rows["worker", LIBRARY]["microseconds"]) == {"read", "decode", "resize", "all else"}
    assert set(rows["everything", LIBRARY]["microseconds"]) == {"read", "decode", "resize", "all else", "colours"}
    assert rows["worker", LIBRARY]["times_of"] == f"everything: {STOCK}"
    gpus = result["gpus"]["stock"] * 100.0 / result["cores"]
    assert gpus == pytest.approx(rows["everything", STOCK]["images_per_cpu_second"])
    assert abs(result["mean_bytes"] / 110_000 - 1) < 0.05 and said[-1] == "round 2 of 2"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(result))
    assert "webdataset + PIL" in console.export_text()
    lines = "\n".join(as_lines(result))
    assert (
        "microseconds an image: read" in lines
        and "images/s: " in lines
        and "raw, against webdataset, shuffled" in lines
    )


def test_folders_and_shards_of_a_user(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "photos", num_images=30, classes=3, size=64, format="mixed")
    convert(tmp_path / "photos", tmp_path / "shards", workers=1)
    for source in ("photos", "shards"):
        result = measure(
            str(tmp_path / source), images=20, views="dinov2/demo", parts=["decode", "worker"], peers=[], **QUICK
        )
        assert (result["images"], result["source"]) == (20, str(tmp_path / source))
        names = [name for part, name in rows_of(result) if part == "decode"]
        assert names == ["torchvision", "PIL"], "not all files are JPEGs"
        assert [view["name"] for view in result["cut"]] == ["global_1", "global_2", "local"]


def test_the_command_prints_one_object(tmp_path: Path) -> None:
    words = ["--parts", "raw", "--peers", "webdataset", "--images", "8", "--seconds", "0.01", "--rounds", "1", "--json"]
    done = scaler("bench", "loader", *words)
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(done.stdout)["rows"]]
    assert names[:3] == ["tarfile, in order", "webdataset, in order", "scaler, in order"]
    assert names[3:] == ["webdataset, shuffled", "scaler, shuffled"]
    wrong = scaler("bench", "loader", "--parts", "speed")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: no part 'speed'; there are everything, worker,")


def test_recipes_say_what_is_cut_and_coloured() -> None:
    assert [view.count for view in Augmentation.find("dinov2").views] == [1, 1, 8]
    assert Augmentation.find("simclr").colors["view_2"].blur_kernel == 23
    assert [view.size for view in Augmentation.find("supervised/demo").views] == [32]
    with pytest.raises(ValueError, match="no recipe 'simlcr'"):
        Augmentation.find("simlcr")
