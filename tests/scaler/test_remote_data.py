"""What a recipe says of remote shards, and what a run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scaler.data import IndexedData
from scaler.layout import Layout
from scaler.recipe import Data, Recipe, load_recipe
from scaler.strategies.processes import ranks_per_node
from scaler.train import main, resolved_recipe
from tests.http import faulty_server
from tests.reading import small_shards
from tests.runs import rows, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("data"), num_images=100)


def notes(recipe: Recipe) -> str:
    return "\n".join(IndexedData(recipe).notes(layout=Layout(1, 16, 1), resumes=False))


def recipe(shards: object, **data: Any) -> Recipe:
    values = {"global_batch_size": 16, "image_size": 32, **data}
    return load_recipe(
        "simclr/demo", overrides=[f"data.{key}={value}" for key, value in {"shards": shards, **values}.items()]
    )


def test_the_size_of_the_cache() -> None:
    values = {"shards": "a", "global_batch_size": 1, "image_size": 32}
    assert Data(**values).cache().max_bytes == 100 * 10**9
    assert Data(**values, cache_size=5000).cache().max_bytes == 5000
    assert Data(**values, cache_size="2 GiB", cache_dir="/a/b").cache().max_bytes == 2 << 30
    assert Data(**values, cache_dir="/a/b").cache().folder == Path("/a/b")
    with pytest.raises(ValueError, match="'much' is not a size"):
        Data(**values, cache_size="much")


def test_a_cache_that_has_no_effect_or_is_too_small_is_told(folder: Path, tmp_path: Path) -> None:
    assert "warning" not in notes(recipe(folder))
    told = notes(recipe(folder, cache_dir=tmp_path, cache_size="1GB"))
    without_effect = "warning: data.cache_dir and data.cache_size set, without effect: only shards of a URL are cached"
    assert f"{without_effect}, not {folder}" in told
    with faulty_server(folder) as server:
        told = notes(recipe(server.url, cache_dir=tmp_path, cache_size="1GB"))
        assert f"cached in {tmp_path}, at most 1 GB" in told and "warning" not in told
        told = notes(recipe(server.url, cache_dir=tmp_path, cache_size=40_000))
        assert "warning: the cache is smaller than that" in told and "set data.cache_size to" in told


def test_no_secret_gets_into_the_run(folder: Path) -> None:
    with faulty_server(folder) as server:
        secret = server.url.replace("//", "//me:password@") + "?signature=abc"
        chosen = recipe(secret, val_shards=secret)
        resolved = resolved_recipe(chosen, shards=IndexedData(chosen).place, settings=chosen.strategy)
    assert resolved["data"]["shards"] == resolved["data"]["val_shards"] == server.url


def test_ranks_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_per_node(8) == 8
    monkeypatch.setenv("LOCAL_SIZE", "4")  # DeepSpeed's name
    assert ranks_per_node(8) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's
    assert ranks_per_node(8) == 2


def test_training_from_a_url_and_what_ends_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", "simclr", shards=folder)
    data = {"global_batch_size": 16, "cache_dir": tmp_path / "cache"}
    options = [f"data.{key}={value}" for key, value in data.items()] + [
        "schedule.total=3 steps",
        "schedule.warmup=1 steps",
    ]
    assert main([str(path), *options, f"run.dir={tmp_path}/local"]) == 0
    with faulty_server(folder) as server:
        options.append(f"data.shards={server.url}")
        assert main([str(path), *options, f"run.dir={tmp_path}/remote"]) == 0
        server.status |= {f"shard-{i:06d}.tar": 403 for i in range(100)}
        options.append(f"data.cache_dir={tmp_path}/other")
        assert main([str(path), *options, f"run.dir={tmp_path}/refused"]) == 1
    assert rows(tmp_path / "local") == rows(tmp_path / "remote")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {server.url}/shard-") and "refused" in error
