"""The loader on real shards: every batch against the source files, on any layout, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.convert import convert
from shards.decode import View, decode_views
from shards.index import ShardIndex
from shards.loader import ShardLoader, _in_order, accumulation_steps, evaluation_batches, working_set_bytes
from shards.order import SampleOrder, ShardNeed
from tests.images import encode_image, make_image_folder, make_pixels

VIEWS = (View("global", 24, count=2, scale=(0.3, 1.0)), View("local", 12, count=3, scale=(0.05, 0.3)))
CENTER = View("eval", 24, kind="center")
SEED = 5

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images in three classes, jpg, png and webp in turn."""
    folder = tmp_path_factory.mktemp("images")
    make_image_folder(folder, num_images=61, format="mixed")
    return folder


@pytest.fixture(scope="module")
def index(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    convert(source, folder, shard_size=20_000, workers=1)
    index = ShardIndex.load(folder)
    assert len(index.shard_names) > 4
    return index


def make_loader(index: ShardIndex, **changes: Any) -> ShardLoader:
    settings: dict[str, Any] = {
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "seed": SEED,
        "views": VIEWS,
        "stop": 72,
    }
    order = SampleOrder(index.shard_sizes, seed=3, lanes=min(4, index.num_samples), shuffle_window=8)
    return ShardLoader(index, order, **{**settings, **changes})


def global_batches(index: ShardIndex, *, world_size: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """The loaders' batches of all ranks put together by global batch, rows sorted by position."""
    parts: dict[int, list[dict[str, Any]]] = {}
    for rank in range(world_size):
        for batch in make_loader(index, rank=rank, world_size=world_size, **changes):
            parts.setdefault(batch["image_number"], []).append(batch)
    result = []
    for image_number, micro_batches in sorted(parts.items()):
        rows = torch.cat([batch["positions"] for batch in micro_batches])
        assert sorted(rows.tolist()) == list(range(12))
        assert {batch["global_batch_size"] for batch in micro_batches} == {12}
        by_row = torch.argsort(rows)
        views = {
            view.name: torch.cat([batch["views"][view.name] for batch in micro_batches], dim=1)[:, by_row]
            for view in VIEWS
        }
        facts = {key: torch.cat([batch[key] for batch in micro_batches])[by_row] for key in ("ids", "epochs", "labels")}
        rejected = sorted((r for batch in micro_batches for r in batch["rejected"]), key=lambda record: record["image"])
        result.append({"image_number": image_number, **views, **facts, "rejected": rejected})
    return result


def assert_equal(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
            assert same, key


@pytest.fixture(scope="module")
def expected(index: ShardIndex) -> list[dict[str, Any]]:
    return global_batches(index)


def test_batches_hold_the_source_files(index: ShardIndex, source: Path, expected: list[dict[str, Any]]) -> None:
    """Pixels and labels from the files of the image folder; ids and epochs from the order."""
    order = SampleOrder(index.shard_sizes, seed=3, lanes=4, shuffle_window=8)
    assert [batch["image_number"] for batch in expected] == list(range(0, 72, 12))
    for batch in expected:
        rows = order.batch(batch["image_number"], 12)
        assert batch["ids"].tolist() == rows.ids.tolist() and batch["epochs"].tolist() == rows.epochs.tolist()
        for row, (id, epoch) in enumerate(zip(rows.ids.tolist(), rows.epochs.tolist(), strict=True)):
            path = source / index.entry(id).source
            views = decode_views(path.read_bytes(), views=VIEWS, seed=SEED, epoch=epoch, sample_id=id)
            assert all(torch.equal(batch[name][:, row], views[name]) for name in views)
            assert index.class_names[batch["labels"][row]] == path.parent.name
    ids = torch.cat([batch["ids"] for batch in expected])
    assert sorted(torch.cat([b["ids"][b["epochs"] == 0] for b in expected]).tolist()) == list(range(61))
    assert len(ids) == 72


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_layouts_give_equal_bytes(
    index: ShardIndex, expected: list[dict[str, Any]], world_size: int, num_workers: int
) -> None:
    assert_equal(global_batches(index, world_size=world_size, num_workers=num_workers), expected)
    if num_workers == 0:
        assert_equal(global_batches(index, world_size=world_size, micro_batch_size=12 // world_size), expected)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_start_methods_give_equal_bytes(index: ShardIndex, expected: list[dict[str, Any]], context: str) -> None:
    assert_equal(global_batches(index, num_workers=1, multiprocessing_context=context), expected)


def test_a_fork_after_reading_leaves_both_sides_right(index: ShardIndex, expected: list[dict[str, Any]]) -> None:
    loader = make_loader(index)  # reads here first, so that open files are inherited below
    first = next(iter(loader))
    workers = make_loader(index, num_workers=2)
    workers._run.args[0].reader = loader._run.args[0].reader
    batches = list(workers)
    assert torch.equal(batches[0]["views"]["global"], first["views"]["global"])
    assert torch.equal(next(iter(loader))["views"]["local"], batches[0]["views"]["local"])


@pytest.mark.parametrize("start", [12, 7, 48])
def test_a_start_anywhere_continues_the_stream(index: ShardIndex, start: int) -> None:
    def images(loader: ShardLoader) -> dict[tuple[int, int], bytes]:
        """(epoch, id) → pixels."""
        return {
            (int(epoch), int(id)): batch["views"]["global"][:, row].numpy().tobytes()
            for batch in loader
            for row, (epoch, id) in enumerate(zip(batch["epochs"], batch["ids"], strict=True))
        }

    late = images(make_loader(index, start=start, stop=start + 24))
    rows = make_loader(index).order.batch(start, 24)
    assert set(late) == set(zip(rows.epochs.tolist(), rows.ids.tolist(), strict=True)) and len(late) == 24
    assert late.items() <= images(make_loader(index, stop=84)).items()


def test_iterating_again_starts_again_and_an_endless_loader_goes_on(index: ShardIndex) -> None:
    loader = make_loader(index, stop=None, num_workers=2)
    first = [next(stream)["ids"].tolist() for stream in (iter(loader), iter(loader))]
    assert first[0] == first[1]
    stream = iter(loader)
    assert [next(stream)["image_number"] for _ in range(40)][-1] == 39 // 6 * 12


def test_the_global_generators_are_left_alone(index: ShardIndex) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]
    list(make_loader(index))
    next(iter(make_loader(index, num_workers=1)))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, ShardIndex]:
    """Eight images in three shards; 02.jpg and 03.jpg are truncated."""
    source = tmp_path / "images"
    source.mkdir()
    for k in range(8):
        data = encode_image(make_pixels(40, 40, seed=k))
        (source / f"{k:02}.jpg").write_bytes(data[:-100] if k in (2, 3) else data)
    convert(source, tmp_path / "shards", shard_size=7_000, shuffle=False, workers=1)
    index = ShardIndex.load(tmp_path / "shards")
    assert len(index.shard_names) == 3
    return source, index


def find_replacement(index: ShardIndex, id: int, bad: set[int]) -> int:
    """The next good sample of the same shard, cyclic."""
    first = 0
    for size in index.shard_sizes.tolist():
        if id < first + size:
            ring = [first + (id - first + k) % size for k in range(size)]
            return next(candidate for candidate in ring if candidate not in bad)
        first += size
    raise AssertionError(id)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_samples_are_replaced_and_reported(damaged: tuple[Path, ShardIndex], num_workers: int) -> None:
    source, index = damaged
    bad = {id for id in range(8) if index.entry(id).source in ("02.jpg", "03.jpg")}
    assert len(bad) == 2 and index.num_samples == 8
    order = SampleOrder(index.shard_sizes, seed=0, lanes=2, shuffle_window=4)
    loader = ShardLoader(
        index, order, views=VIEWS, seed=SEED, global_batch_size=4, micro_batch_size=4, num_workers=num_workers, stop=16
    )
    records = []
    for batch in loader:
        records += batch["rejected"]
        for row, id in enumerate(batch["ids"].tolist()):
            shown = find_replacement(index, id, bad)
            data = (source / index.entry(shown).source).read_bytes()
            views = decode_views(data, views=VIEWS, seed=SEED, epoch=int(batch["epochs"][row]), sample_id=id)
            assert all(torch.equal(batch["views"][name][:, row], views[name]) for name in views)
    assert sorted((record["epoch"], record["id"]) for record in records) == sorted((e, b) for e in (0, 1) for b in bad)
    for record in records:
        shown = find_replacement(index, record["id"], bad)
        rows = order.batch(record["image"], 1)
        assert (int(rows.ids[0]), int(rows.epochs[0])) == (record["id"], record["epoch"])
        assert record["key"] == Path(record["source"]).stem
        assert (record["replacement_id"], record["replacement_key"]) == (shown, index.keys([shown])[0])
        assert record["shard"] == index.shard_names[index.entry(record["id"]).shard]
        assert "truncated" in record["reason"]
        json.dumps(record)


def test_the_label_is_that_of_the_picture_shown(tmp_path: Path) -> None:
    for k, name in enumerate(("ape", "bee")):
        (tmp_path / "images" / name).mkdir(parents=True)
        data = encode_image(make_pixels(40, 40, seed=k))
        (tmp_path / "images" / name / f"{k}.jpg").write_bytes(data[:-50] if name == "ape" else data)
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    index = ShardIndex.load(tmp_path / "shards")
    (batch,) = make_loader(index, global_batch_size=2, stop=2)
    assert batch["labels"].tolist() == [1, 1] and sorted(batch["ids"].tolist()) == [0, 1]


def user_error(iterator: Iterator[Any]) -> str:
    """The message of the plain one-line ValueError with which `iterator` ends."""
    with pytest.raises(ValueError) as caught:
        list(iterator)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def copy_of(index: ShardIndex, tmp_path: Path) -> ShardIndex:
    shutil.copytree(index.path, tmp_path / "copy")
    return ShardIndex.load(tmp_path / "copy")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_is_named(index: ShardIndex, tmp_path: Path, num_workers: int) -> None:
    copy = copy_of(index, tmp_path)
    copy.shard_path(2).unlink()
    message = user_error(iter(make_loader(copy, num_workers=num_workers)))
    assert str(copy.shard_path(2)) in message and "missing" in message
    batches = evaluation_batches(copy, view=CENTER, batch_size=8, num_workers=num_workers)
    assert str(copy.shard_path(2)) in user_error(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_shard_is_named(index: ShardIndex, tmp_path: Path, num_workers: int) -> None:
    copy = copy_of(index, tmp_path)
    os.truncate(copy.shard_path(1), copy.shard_path(1).stat().st_size // 2)
    assert str(copy.shard_path(1)) in user_error(iter(make_loader(copy, num_workers=num_workers)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", [0, -100])
def test_a_sample_that_was_damaged_after_indexing_is_no_bad_picture(
    index: ShardIndex, tmp_path: Path, num_workers: int, where: int
) -> None:
    """It would be replaced by another one, or shown with other pixels, without a word."""
    copy = copy_of(index, tmp_path)
    entry = copy.entry(20)
    with copy.shard_path(entry.shard).open("r+b") as file:
        file.seek(entry.offset + where % entry.size)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    for batches in (
        iter(make_loader(copy, num_workers=num_workers)),
        evaluation_batches(copy, view=CENTER, batch_size=8, num_workers=num_workers),
    ):
        message = user_error(batches)
        assert str(copy.shard_path(entry.shard)) in message and "damaged" in message and repr(entry.key) in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_offset_file_is_named(index: ShardIndex, tmp_path: Path, num_workers: int) -> None:
    copy = copy_of(index, tmp_path)
    file = sorted(tmp_path.rglob("*.offsets"))[2]
    file.write_bytes(file.read_bytes()[:-3])
    assert str(file) in user_error(iter(make_loader(copy, num_workers=num_workers)))
    assert str(file) in user_error(evaluation_batches(copy, view=CENTER, batch_size=8, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_tell_what_their_workers_spent_and_lie_in_shared_memory(index: ShardIndex, num_workers: int) -> None:
    began = time.perf_counter()
    seconds = {"read": 0.0, "decode": 0.0, "resize": 0.0}
    for batch in make_loader(index, num_workers=num_workers):
        assert batch["seconds"].keys() == seconds.keys() and min(batch["seconds"].values()) > 0
        seconds = {stage: spent + batch["seconds"][stage] for stage, spent in seconds.items()}
        assert all(view.is_shared() == bool(num_workers) and view.is_contiguous() for view in batch["views"].values())
    assert sum(seconds.values()) < max(1, num_workers) * (time.perf_counter() - began)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_with_nothing_decodable_is_an_error(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "images").mkdir()
    for k in range(3):
        (tmp_path / "images" / f"{k}.jpg").write_bytes(encode_image(make_pixels(40, 40, seed=k))[:-50])
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    index = ShardIndex.load(tmp_path / "shards")
    message = user_error(iter(make_loader(index, num_workers=num_workers)))
    assert str(index.shard_path(0)) in message and "none of its 3 samples can be decoded" in message


def test_max_pixels_reaches_the_workers(index: ShardIndex) -> None:
    message = user_error(iter(make_loader(index, max_pixels=100, num_workers=1)))
    assert "above max_pixels 100" in message


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_of_some_samples_only(index: ShardIndex) -> None:
    """Each once over the ranks, and of remote shards only those are fetched whole that are wanted by half."""
    first, second = (int(size) for size in index.shard_sizes[:2])
    ids = np.array([*range(first), first + second - 1, *range(40, index.num_samples, 7)])
    parts = [evaluation_batches(index, view=CENTER, batch_size=4, ids=ids, rank=r, world_size=2) for r in (0, 1)]
    blocks = [batch for pair in zip(*parts, strict=True) for batch in pair]
    seen = [int(i) for batch in blocks for i, weight in zip(batch["ids"], batch["weights"], strict=True) if weight]
    assert seen == ids.tolist()
    assert next(_in_order(index, ids)) == ShardNeed(0, first, 0)
    assert [need.shard for need in _in_order(index, np.arange(first + second // 2, first + second))] == [1]
    assert [need.shard for need in _in_order(index, None)] == list(range(len(index.shard_sizes)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_sample_once(index: ShardIndex, source: Path, world_size: int, num_workers: int) -> None:
    ranks = [
        list(
            evaluation_batches(index, view=CENTER, batch_size=7, rank=r, world_size=world_size, num_workers=num_workers)
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    ids, labels, weights, images = (
        torch.cat([b[key] for b in in_order]) for key in ("ids", "labels", "weights", "images")
    )
    assert {len(batch["ids"]) for batch in in_order} == {7}
    assert ids[:61].tolist() == list(range(61)) and (ids[61:] == -1).all()
    assert weights.dtype == torch.float32 and weights.tolist() == [1.0] * 61 + [0.0] * (len(ids) - 61)
    assert labels[:61].tolist() == index.labels(range(61)).tolist() and (labels[61:] == -1).all()
    for id in range(61):
        data = (source / index.entry(id).source).read_bytes()
        assert torch.equal(images[id], decode_views(data, views=[CENTER], seed=0, epoch=0, sample_id=0)["eval"][0])


def test_evaluation_reports_what_it_cannot_decode(damaged: tuple[Path, ShardIndex]) -> None:
    _, index = damaged
    batches = list(evaluation_batches(index, view=CENTER, batch_size=8))
    (batch,) = batches
    bad = [id for id in range(8) if index.entry(id).source in ("02.jpg", "03.jpg")]
    assert batch["ids"].tolist() == list(range(8))
    assert batch["weights"].tolist() == [0.0 if id in bad else 1.0 for id in range(8)]
    assert [record["id"] for record in batch["rejected"]] == bad
    assert [record["source"] for record in batch["rejected"]] == ["02.jpg", "03.jpg"]
    assert all("truncated" in record["reason"] for record in batch["rejected"])
    assert not batch["images"][bad].any()


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 4}, "nearest valid choices: a global batch of 8 or 12"),
        ({"global_batch_size": 10, "micro_batch_size": 4}, "a micro-batch of 2 or 5"),
        ({"global_batch_size": 10, "world_size": 3}, "a global batch of 6 or 12"),
        ({"global_batch_size": 0}, "must be at least 1"),
        ({"rank": 2, "world_size": 2}, "not 2 of 2"),
        ({"start": -1}, "not -1"),
        ({"views": ()}, "names that differ"),
        ({"views": (View("a", 8), View("a", 9))}, "names that differ"),
    ],
)
def test_wrong_arguments(index: ShardIndex, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        make_loader(index, **changes)
    assert words in str(error.value)


def test_an_order_of_other_shards_is_refused(index: ShardIndex) -> None:
    order = SampleOrder([5], seed=0, lanes=1, shuffle_window=4)
    with pytest.raises(ValueError, match="5 samples"):
        ShardLoader(index, order, views=VIEWS, seed=0, global_batch_size=2, micro_batch_size=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"view": View("v", 8)}, "kind center"),
        ({"view": View("v", 8, count=2, kind="center")}, "one view"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 1}, "not 1 of 1"),
    ],
)
def test_wrong_evaluation_arguments(index: ShardIndex, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluation_batches(index, **{"view": CENTER, "batch_size": 4, **changes})


def test_accumulation_steps() -> None:
    assert accumulation_steps(2048, micro_batch_size=64, world_size=8) == 4
    assert accumulation_steps(6, micro_batch_size=1, world_size=6) == 1


def test_the_working_set_is_windows_times_lanes(index: ShardIndex) -> None:
    order = SampleOrder(index.shard_sizes, seed=0, lanes=2, shuffle_window=5)
    assert working_set_bytes(index, order) == 10 * index.num_bytes // 61
    everything = SampleOrder(index.shard_sizes, seed=0, lanes=4, shuffle_window=1000)
    assert working_set_bytes(index, everything) == index.num_bytes
