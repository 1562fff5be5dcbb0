"""What goes where: cuts of equal size, and a validation part that is exact, disjoint and drawn from each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.convert import convert
from shards.index import ShardIndex
from shards.layout import Plan
from shards.places import locate
from shards.sources import Files
from shards.writer import Options
from tests.images import make_image_folder


def files(sizes: list[int], labels: list[int] | None = None) -> Files:
    return Files(
        root="nowhere",
        paths=[f"{i}.jpg" for i in range(len(sizes))],
        sizes=np.array(sizes, dtype=np.int64),
        labels=np.array(labels or [-1] * len(sizes), dtype=np.int64),
        class_names=[str(i) for i in range(max(labels) + 1)] if labels else [],
        digest="",
        rejected=[],
        ignored=[],
    )


def plan(source: Files, **options) -> Plan:
    wanted = {"name": "s", "shard_size": None, "seed": 0, "shuffle": True, "val_fraction": None, **options}
    return Plan(source, locate("memory://x"), Options(), **wanted)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_the_validation_part(labels: list[int], fraction: float, seed: int, shuffle: bool) -> None:
    size, count = len(labels), round(fraction * len(labels))
    if not 0 < count < size:
        with pytest.raises(ValueError, match="both parts need at least one image"):
            plan(files([9] * size, labels), val_fraction=fraction, seed=seed)
        return
    splits = plan(files([9] * size, labels), val_fraction=fraction, seed=seed, shuffle=shuffle).splits
    train, val = splits["train"].tolist(), splits["val"].tolist()
    assert sorted(train + val) == list(range(size)) and len(val) == count
    for label in set(labels):
        share = labels.count(label) * count / size
        assert abs(sum(labels[i] == label for i in val) - share) < 1
    if not shuffle:
        assert train == sorted(train) and val == sorted(val)


def test_the_validation_part_is_drawn_by_the_seed() -> None:
    parts = [set(plan(files([9] * 1000), val_fraction=0.1, seed=seed).splits["val"].tolist()) for seed in range(6)]
    again = set(plan(files([9] * 1000), val_fraction=0.1, seed=0).splits["val"].tolist())
    assert again == parts[0] and len(set.union(*parts)) > 400
    counts = np.histogram(list(set.union(*parts)), bins=4, range=(0, 1000))[0]
    assert counts.min() > 70, "from everywhere"


def test_small_sets_have_enough_shards_for_some_processes() -> None:
    assert len(plan(files([1_000_000] * 500)).names) == 8
    assert len(plan(files([1_000_000] * 50)).names) == 3
    assert len(plan(files([1_000_000] * 5)).names) == 1
    assert len(plan(files([10_000_000] * 500)).names) == 20
    assert len(plan(files([1_000_000] * 500), shard_size=256_000_000).names) == 2, "what is asked for is done"


def test_both_parts_are_data_sets(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=50, classes=5)
    report = convert(tmp_path / "src", tmp_path / "out", val_fraction=0.2, shard_size="20KB", workers=2)
    assert report.splits == {"train": 40, "val": 10} and report.num_samples == 50
    sources: dict[str, set[str]] = {}
    for part in ("train", "val"):
        index = ShardIndex.load(tmp_path / "out" / part)
        assert index.class_names == report.class_names
        labels = index.labels(range(len(index)))
        assert np.bincount(labels).tolist() == [report.splits[part] // 5] * 5
        sources[part] = {index.entry(i).source for i in range(len(index))}
    assert sources["train"].isdisjoint(sources["val"]) and len(sources["train"] | sources["val"]) == 50
    again = convert(tmp_path / "src", tmp_path / "out", val_fraction=0.2, shard_size="20KB", workers=1)
    assert again.num_skipped_finished == again.num_shards
    with pytest.raises(ValueError, match=r"begun with other options \(val_fraction 0\.2 → None\)"):
        convert(tmp_path / "src", tmp_path / "out", shard_size="20KB", workers=1)
    for wrong in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match="a fraction lies between 0 and 1"):
            convert(tmp_path / "src", tmp_path / "x", val_fraction=wrong)
