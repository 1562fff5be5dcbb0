"""Features of real shards: every sample once and in index order on one and on two ranks, against a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from scaler.collectives import World
from scaler.evals.features import Extraction, extract_features, extract_part
from scaler.evals.store import FeatureStore, Kept
from shards.convert import convert
from shards.decode import DEFAULT_MAX_PIXELS, View, decode_views
from shards.index import ShardIndex
from tests.images import make_image_folder

VIEW = View("eval", size=24, kind="center")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def patches(images: Tensor) -> Tensor:
    """A feature that depends on every part of the picture: means of 3 x 3 patches, [n, 27]."""
    assert images.shape[1:] == (3, 24, 24) and images.dtype == torch.float32
    return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


def extract(world: World, shards: str, batch_size: int, num_workers: int) -> tuple[Tensor, Tensor]:
    return extract_features(
        patches,
        ShardIndex.load(shards),
        view=VIEW,
        batch_size=batch_size,
        num_workers=num_workers,
        device="cpu",
        world=world,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in three classes, one of them cut off in the middle, in `images` and `shards`."""
    path = tmp_path_factory.mktemp("features")
    files = make_image_folder(path / "images", num_images=23, classes=3, size=48)
    files[7].write_bytes(files[7].read_bytes()[: files[7].stat().st_size // 2])
    convert(path / "images", path / "shards", shard_size="20KB", workers=1)
    return path


def expected(folder: Path) -> tuple[Tensor, Tensor, int]:
    """(features, labels, id of the broken image), from the source files alone, in the order of the index."""
    index = ShardIndex.load(folder / "shards")
    assert len(index.shard_sizes) > 1
    rows, labels, broken = [], [], -1
    for i in range(index.num_samples):
        file = folder / "images" / index.entry(i).source
        if file.name == "image_00007.jpg":
            broken = i
            continue
        views = decode_views(
            file.read_bytes(), views=[VIEW], seed=0, epoch=0, sample_id=i, max_pixels=DEFAULT_MAX_PIXELS
        )
        rows.append(patches(normalize(views["eval"].float() / 255, list(MEAN), list(STD)))[0])
        labels.append(int(file.parent.name.removeprefix("class_")))
    return torch.stack(rows), torch.tensor(labels), broken


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 0), (23, 0), (64, 0), (5, 2)])
def test_every_sample_once_in_index_order(folder: Path, batch_size: int, num_workers: int) -> None:
    features, labels, broken = expected(folder)
    assert 0 < broken < 22  # a gap in the middle
    with pytest.warns(UserWarning, match=r"1 of 23 samples in .* are left out; the first, class_1"):
        got = extract(World(), str(folder / "shards"), batch_size, num_workers)
    torch.testing.assert_close(got[0], features, rtol=1e-5, atol=1e-5)
    assert got[1].dtype == torch.int64 and torch.equal(got[1], labels)


def test_an_interrupted_extraction_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk; what is complete or damaged on the disk is seen, and so is what could not be decoded then."""
    monkeypatch.setattr("scaler.evals.store.CHUNK", 4)
    features, labels, broken = expected(folder)
    index = ShardIndex.load(folder / "shards")
    seen: list[int] = []

    def interrupted(images: Tensor) -> Tensor:
        if sum(seen) + len(images) > stop:
            raise KeyboardInterrupt
        seen.append(len(images))
        return patches(images)

    def extracted(facts: str = "a") -> Extraction:
        store = FeatureStore(Kept(tmp_path), {"weights": facts})
        options = {"view": VIEW, "batch_size": 3, "num_workers": 0, "device": "cpu", "world": World()}
        return extract_part(interrupted, index, store=store, **options)

    stop = 12
    with pytest.raises(KeyboardInterrupt):
        extracted()
    stop, seen[:] = 10**6, []
    with pytest.warns(UserWarning, match="1 of 23 samples"):
        found = extracted()
    assert (found.images, found.num_samples) == (23 - 12, 23) and found.images_per_second > 0
    seen.clear()
    with pytest.warns(UserWarning, match="1 of 23 samples"):
        again = extracted()
    assert not seen and again.images == 0 and again.images_per_second is None
    for part in (found.part, again.part):
        assert part.ids.tolist() == [i for i in range(23) if i != broken]
        assert torch.equal(part.labels, labels)
        torch.testing.assert_close(part.features, features, rtol=1e-5, atol=1e-5)

    chunks = sorted(tmp_path.rglob("*.safetensors"))
    assert len(chunks) == 6 and not list(tmp_path.rglob("*.tmp*"))
    chunks[2].write_bytes(chunks[2].read_bytes()[:-5])
    with pytest.warns(UserWarning, match="1 of 23 samples"):
        assert extracted().images == 4, "of the damaged chunk alone"
        assert extracted("b").images == 23, "of other weights"


def test_shards_without_labels_give_minus_one(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", num_images=4, classes=0, size=40)
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    features, labels = extract(World(), str(tmp_path / "shards"), 3, 0)
    assert features.shape == (4, 27) and labels.tolist() == [-1] * 4


def test_nothing_that_decodes_is_an_error(tmp_path: Path) -> None:
    for file in make_image_folder(tmp_path / "images", num_images=3, classes=0, size=40):
        file.write_bytes(file.read_bytes()[:-600])
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    with pytest.raises(ValueError, match="no sample can be decoded; the first, image_0000"):
        extract(World(), str(tmp_path / "shards"), 2, 0)
