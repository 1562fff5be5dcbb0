"""`ShardIndex` against naive look-ups; `build_index` on tars that other tools made, and on damaged ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tarfile
import time
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards.convert import convert
from shards.decode import View
from shards.index import ShardIndex, ShardRecord
from shards.indexing import build_index, sorted_by_class
from shards.loader import ShardLoader
from shards.offsets import Sample, pack_offsets
from shards.order import SampleOrder
from shards.stream import StreamLoader
from shards.verify import FileReport, verify
from tests.images import encode_image, make_image_folder, make_pixels


@pytest.fixture
def made(tmp_path: Path) -> ShardIndex:
    """30 images in 3 classes, in about 6 shards."""
    make_image_folder(tmp_path / "src", num_images=30, format="mixed")
    convert(tmp_path / "src", tmp_path / "out", shard_size="25KB", workers=1)
    return ShardIndex.load(tmp_path / "out")


def write_tar(path: Path, members: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def photo(seed: int) -> bytes:
    return encode_image(make_pixels(16 + seed % 5, 16, seed=seed))


def image_bytes(index: ShardIndex, id: int) -> bytes:
    entry = index.entry(id)
    return index.shard_path(entry.shard).read_bytes()[entry.offset : entry.offset + entry.size]


def test_look_ups_agree_with_a_naive_list(made: ShardIndex) -> None:
    naive = [(shard, local) for shard, size in enumerate(made.shard_sizes) for local in range(size)]
    assert len(naive) == made.num_samples == len(made) == 30 and len(made.shard_names) > 3
    shards, locals_ = made.locate(range(30))
    assert list(zip(shards.tolist(), locals_.tolist(), strict=True)) == naive
    ids = np.random.default_rng(0).integers(0, 30, size=(7, 5))
    assert made.locate(ids)[0].tolist() == [[naive[i][0] for i in row] for row in ids]
    entries = [made.entry(id) for id in range(30)]
    assert made.labels(ids).tolist() == [[entries[i].label for i in row] for row in ids]
    assert made.keys(ids.ravel()) == [entries[i].key for i in ids.ravel()]
    for entry in entries:
        assert made.class_names[entry.label] == entry.key.partition("/")[0] == entry.source.partition("/")[0]
        assert entry.source == f"{entry.key}.{entry.extension}"
    assert made.labels([]).shape == (0,) and made.keys([]) == []
    for wrong in (-1, 30):
        with pytest.raises(ValueError, match=r"holds only 0 … 29"):
            made.entry(wrong)


def test_shards_without_samples_are_stepped_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"note.txt": b"only"})
    write_tar(tmp_path / "b.tar", {"x.jpg": photo(0), "y.jpg": photo(1)})
    write_tar(tmp_path / "c.tar", {"note.txt": b"only"})
    write_tar(tmp_path / "d.tar", {"z.jpg": photo(2)})
    index = build_index(tmp_path, workers=1)
    assert index.shard_sizes.tolist() == [0, 2, 0, 1]
    assert index.locate([0, 1, 2])[0].tolist() == [1, 1, 3]
    assert index.keys([2, 0, 1]) == ["z", "x", "y"]


def read_entry(index: ShardIndex, queue: multiprocessing.Queue) -> None:
    queue.put((index.entry(17), index.labels(range(30)).tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_goes_to_worker_processes(made: ShardIndex, method: str) -> None:
    context = multiprocessing.get_context(method)
    made.labels(range(30))  # with open offset files
    queue = context.Queue()
    process = context.Process(target=read_entry, args=(made, queue))
    process.start()
    assert queue.get(timeout=60) == (made.entry(17), made.labels(range(30)).tolist())
    process.join()


def test_few_files_stay_open(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=400, size=8, classes=2)
    convert(tmp_path / "src", tmp_path / "out", shard_size=1, workers=2)
    index = ShardIndex.load(tmp_path / "out")
    before = len(os.listdir("/proc/self/fd"))
    assert len(set(index.keys(range(400)))) == 400
    assert sorted(np.bincount(index.labels(range(400)))) == [200, 200]
    assert len(os.listdir("/proc/self/fd")) - before <= 260


def test_two_hundred_thousand_shards(tmp_path: Path) -> None:
    shards = [ShardRecord(f"shard-{i:06d}.tar", 256_000_000, 10_000, f"{i:064x}") for i in range(200_000)]
    ShardIndex(tmp_path, shards=shards, class_names=["a"]).save()
    start = time.process_time()
    index = ShardIndex.load(tmp_path)
    assert time.process_time() - start < 2
    assert index.num_samples == 2_000_000_000
    assert [part.tolist() for part in index.locate([0, 1_999_999_999])] == [[0, 199_999], [0, 9_999]]
    assert len(pickle.dumps(index)) < 40_000_000


def test_indexing_converted_shards_again_gives_the_same(made: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "src/class_0/CAPITAL.dots.JPG").write_bytes(photo(0))
    convert(tmp_path / "src", tmp_path / "named", workers=1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "named").iterdir()}
    named = build_index(tmp_path / "named", workers=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "named").iterdir()} == before
    assert "class_0/CAPITAL.dots.JPG" in {named.entry(id).source for id in range(31)}

    before = {file.name: file.read_bytes() for file in made.path.iterdir()}
    for file in [*made.path.glob("*.offsets")]:
        file.unlink()
    again = build_index(made.path, workers=2)
    assert {file.name: file.read_bytes() for file in made.path.iterdir()} == before
    assert again.fingerprint == made.fingerprint and again.class_names == ["class_0", "class_1", "class_2"]
    (made.path / "index.json").unlink()
    assert build_index(made.path, workers=1).class_names == ["0", "1", "2"]


LONG = "folder with a long name " * 6 + "/" + "n" * 120
NAMES = ["a.jpg", "sub dir/größe.jpeg", f"{LONG}/x.png", "d.e/f.webp", "UP.JPG", "./g.jpg"]


@pytest.mark.parametrize("format", ["ustar", "gnu", "posix"])
def test_gnu_tar(tmp_path: Path, format: str) -> None:
    names = [name for name in NAMES if format != "ustar" or len(name) < 100]
    contents = {name: photo(seed) for seed, name in enumerate(names)}
    label_of = {name: name.rpartition(".")[0] + ".cls" for name in names}
    for name, data in contents.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
        (tmp_path / "src" / label_of[name]).write_text("3")
    members = [member for name in names for member in (name, label_of[name])]
    (tmp_path / "out").mkdir()
    command = ["tar", "-C", tmp_path / "src", f"--format={format}", "-cf", tmp_path / "out/s.tar", *members]
    subprocess.run(command, check=True)
    index = build_index(tmp_path / "out", workers=1)
    read = list(webdataset.WebDataset(str(tmp_path / "out/s.tar"), shardshuffle=False))
    assert index.keys(range(len(index))) == [sample["__key__"] for sample in read]
    assert len(read) == len(names) and set(index.labels(range(len(index)))) == {3}
    for id, (name, sample) in enumerate(zip(names, read, strict=True)):
        extension = name.rpartition(".")[2].lower()
        assert index.entry(id).extension == extension and index.entry(id).source == name
        assert image_bytes(index, id) == contents[name] == sample[extension]
    assert len(index.class_names) == 4


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python_tarfile(tmp_path: Path, format: int) -> None:
    long = (
        ["p" * 90 + "/" + "q" * 90 + ".jpg"]
        if format == tarfile.USTAR_FORMAT
        else [LONG + "/x.jpg", "é" * 130 + ".jpg"]
    )
    contents = {name: photo(seed) for seed, name in enumerate(["a.jpg", *long, "z.jpg"])}
    write_tar(tmp_path / "s.tar", contents, format=format)
    index = build_index(tmp_path, workers=1)
    assert [image_bytes(index, id) for id in range(len(index))] == list(contents.values())
    assert index.labels(range(len(index))).tolist() == [-1] * len(contents) and index.class_names == []


def test_webdataset_writer(tmp_path: Path) -> None:
    images = [photo(seed) for seed in range(25)]
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=10, verbose=0) as writer:
        for i, data in enumerate(images):
            writer.write({"__key__": f"k{i:03d}", "jpg": data, "cls": i % 4, "json": {"i": i}, "seg.png": b"mask"})
    index = build_index(tmp_path, workers=2)
    assert index.shard_names == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    assert index.shard_sizes.tolist() == [10, 10, 5]
    assert [image_bytes(index, id) for id in range(25)] == images
    assert index.labels(range(25)).tolist() == [i % 4 for i in range(25)]
    (tmp_path / "x-000001.offsets").write_bytes((tmp_path / "x-000000.offsets").read_bytes())  # of another shard
    assert [image_bytes(build_index(tmp_path, workers=1), id) for id in range(25)] == images
    other = build_index(tmp_path, workers=1, image_extensions=["seg.png", "jpg"])
    assert image_bytes(other, 0) == b"mask" and other.entry(0).extension == "seg.png"


def test_img2dataset_layout(tmp_path: Path) -> None:
    """KEY.jpg, KEY.txt, KEY.json with keys of nine digits, some missing; one shard whose downloads all failed."""
    images = {f"{shard:05d}{i:04d}": photo(10 * shard + i) for shard in (0, 2) for i in (0, 1, 3, 7)}
    for shard in range(3):
        members = {}
        for key, data in images.items():
            if key.startswith(f"{shard:05d}"):
                members |= {f"{key}.jpg": data, f"{key}.txt": b"a caption", f"{key}.json": b'{"status": "success"}'}
        if not members:
            members = {f"{shard:05d}0000.json": b'{"status": "failed_to_download"}'}
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"of img2dataset")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    index = build_index(tmp_path, workers=2)
    assert index.keys(range(8)) == list(images) and index.shard_sizes.tolist() == [4, 0, 4]
    assert [image_bytes(index, id) for id in range(8)] == list(images.values())
    assert index.skipped() == [("000010000", "no image among its members (json)")]
    assert verify(tmp_path, workers=1) == [
        FileReport(name, int(size), (tmp_path / name).stat().st_size, [])
        for name, size in zip(index.shard_names, index.shard_sizes, strict=True)
    ]
    order = SampleOrder(index.shard_sizes, seed=0, lanes=2, shuffle_window=2)
    loader = ShardLoader(index, order, views=[View("v", 8)], seed=0, global_batch_size=8, micro_batch_size=8, stop=16)
    assert [sorted(batch["ids"].tolist()) for batch in loader] == [list(range(8))] * 2


def test_several_images_a_sample(tmp_path: Path) -> None:
    left, right = photo(0), photo(1)
    write_tar(tmp_path / "s.tar", {"a.left.jpg": left, "a.right.jpg": right, "b.Right.JPG": right, "c.left.jpg": left})
    with pytest.raises(ValueError, match=r"no images .*'a' has no image among its members \(left.jpg, right.jpg\)"):
        build_index(tmp_path, workers=1)
    index = build_index(tmp_path, workers=1, image_extensions=["left.jpg"])
    assert index.keys(range(2)) == ["a", "c"] and image_bytes(index, 0) == left
    assert index.skipped() == [("b", "no image among its members (right.jpg)")]
    index = build_index(tmp_path, workers=1, image_extensions=["right.jpg", "left.jpg"])
    assert [image_bytes(index, id) for id in range(3)] == [right, right, left]
    assert [index.entry(id).extension for id in range(3)] == ["right.jpg", "right.jpg", "left.jpg"]


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", {"a.jpg": photo(number)})
        if number != 2:
            (tmp_path / f"{number}.tar").write_bytes((tmp_path / f"{number}.tar").read_bytes()[:700])
    with pytest.raises(
        ValueError, match=r"0\.tar is cut off.*; shard .*1\.tar is.*; shard .*3\.tar is.* \(and 2 more\)$"
    ):
        build_index(tmp_path, workers=2)
    assert not (tmp_path / "index.json").exists()


def test_a_pipe_called_tar_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(ValueError, match=r"s\.tar is cut off or damaged at byte 0 \(the file ends there\)"):
        build_index(tmp_path, workers=1)


def test_nothing_in_a_shard_is_run(tmp_path: Path) -> None:
    """What would do something if it were unpickled, imported or sourced, beside an image and in its place."""

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mknod, (str(tmp_path / "touched"),)

    script = f"open({str(tmp_path / 'touched')!r}, 'w')".encode()
    evil, endings = pickle.dumps(Touch()), ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cbor", "tenbin", "jpg"]
    members = {f"a{i}.{ending}": data for i, data in enumerate((evil, script)) for ending in endings}
    members |= {"b.jpg": photo(0), "b.pkl": evil, "b.cls": b"1", "__init__.py": script, "conftest.py": script}
    write_tar(tmp_path / "s.tar", members)
    index = build_index(tmp_path, workers=1)
    order = SampleOrder(index.shard_sizes, seed=0, lanes=1, shuffle_window=2)
    loader = ShardLoader(index, order, views=[View("v", 8)], seed=0, global_batch_size=3, micro_batch_size=3, stop=3)
    (batch,) = loader
    assert {row["key"] for row in batch["rejected"]} == {"a0", "a1"}
    (streamed,) = StreamLoader(
        [str(tmp_path / "s.tar")], views=[View("v", 8)], seed=0, global_batch_size=3, micro_batch_size=3, stop=3
    )
    assert set(streamed["labels"].tolist()) == {1}
    (report,) = verify(tmp_path, workers=1, decode=True)
    assert len(report.problems) == 2 and not (tmp_path / "touched").exists()
    with pytest.raises(ValueError, match=r"'b.cls' holds b'.*', which is no class number"):
        write_tar(tmp_path / "s.tar", {"b.jpg": photo(0), "b.cls": evil[:30]})
        build_index(tmp_path, workers=1)
    assert not (tmp_path / "touched").exists()
    pickle.loads(evil)  # it would have
    assert (tmp_path / "touched").exists()


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    members = {
        "a.jpg": photo(0),
        "a.txt": b"t",
        "b.txt": b"t",
        "b.json": b"{}",
        "__m__/c.jpg": photo(1),
        "README": b"r",
    }
    write_tar(tmp_path / "s.tar", members)
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    index = build_index(tmp_path, workers=1)
    assert index.keys(range(len(index))) == ["a"]
    assert dict(ShardIndex.load(tmp_path).skipped()) == {
        "b": "no image among its members (txt, json)",
        "__m__/c.jpg": "a name that webdataset skips",
        "README": "no key and ending",
        "d.jpg": "a link, a sparse or a special file",
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_truncation_anywhere_is_an_error(tmp_path: Path, format: int) -> None:
    write_tar(tmp_path / "s.tar", {f"{'k' * 40}{i}/é{i}.jpg": photo(i) for i in range(5)}, format=format)
    content = (tmp_path / "s.tar").read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    cuts = np.random.default_rng(0).integers(0, end + 512, size=60).tolist()
    for cut in [0, 1, 511, 512, 513, 1024, end - 512, end - 1, end, end + 511, *cuts]:
        (tmp_path / "s.tar").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"^shard .*s\.tar is cut off or damaged"):
            build_index(tmp_path, workers=1)
    (tmp_path / "s.tar").write_bytes(content[: end + 512])
    assert len(build_index(tmp_path, workers=1)) == 5


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")], r"s\.tar holds the key 'a' twice"),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], r"s\.tar holds 'a.JPG' twice"),
        ([("a.jpg", b"1"), ("a.cls", b"dog")], r"s\.tar: 'a.cls' holds b'dog', which is no class number"),
        ([("a.jpg", b"1"), ("a.cls", b"-7")], r"holds b'-7', which is no class number"),
        ([("a.jpg", b"1"), ("a.cls", b"99999999")], r"labels in .* go up to 99999999; class numbers count from 0"),
        ([("a.txt", b"1")], r"no images \(jpg, jpeg, png, webp\) in the 1 shards"),
    ],
)
def test_tars_that_cannot_be_indexed(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    with pytest.raises(ValueError, match=message) as caught:
        build_index(tmp_path, workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_folders_without_tars(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.tar files in .*; `scaler convert SOURCE"):
        build_index(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.tar\.gz is compressed: shards must be plain tar"):
        build_index(tmp_path)
    with pytest.raises(ValueError, match=r"no \.tar files in .*missing"):
        build_index(tmp_path / "missing")


def test_check_shard(made: ShardIndex) -> None:
    path = made.shard_path(1)
    content = path.read_bytes()
    made.check_shard(1, full=True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"shard-000001\.tar was cut off: \d+ bytes, index.json says \d+; copy it again"
    ):
        made.check_shard(1, full=False)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"shard-000001\.tar has changed: \d+ bytes"):
        made.check_shard(1, full=False)
    path.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    made.check_shard(1, full=False)
    with pytest.raises(ValueError, match=r"shard-000001\.tar has changed: its sha256"):
        made.check_shard(1, full=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing; copy it again .* or run `scaler index"):
        made.check_shard(1, full=False)


def test_offset_files_of_other_shards_are_refused(made: ShardIndex) -> None:
    shutil.copy(made.path / "shard-000000.offsets", made.path / "shard-000001.offsets")
    with pytest.raises(ValueError, match=r"shard-000001\.offsets does not belong to"):
        ShardIndex.load(made.path).labels(range(30))
    (made.path / "shard-000001.offsets").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.offsets is damaged or missing: No such file"):
        ShardIndex.load(made.path).labels(range(30))


def edit(index: ShardIndex, change) -> None:
    data = json.loads((index.path / "index.json").read_text())
    change(data)
    (index.path / "index.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["shards"][0].update(samples=99), "fingerprint does not match"),
        (lambda d: d["shards"].pop(), "fingerprint does not match"),
        (lambda d: d["class_names"].reverse(), "fingerprint does not match"),
        (lambda d: d["shards"][0].pop("sha256"), "shards are not listed as"),
        (lambda d: d["shards"][0].update(bytes=-1), "shards are not listed as"),
        (lambda d: d["shards"][0].update(samples=10**30), "shards are not listed as"),
        (lambda d: d.pop("shards"), "shards are not listed as"),
        (lambda d: d.update(class_names=[1]), "class names are not a list"),
        (lambda d: d.update(format=2), "has format 2, this version reads 1"),
        (lambda d: d.pop("format"), "has no format number"),
    ],
)
def test_damaged_indexes(made: ShardIndex, change, message: str) -> None:
    edit(made, change)
    with pytest.raises(ValueError, match=rf"index\.json .*{message}.*scaler index") as caught:
        ShardIndex.load(made.path)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_no_index(made: ShardIndex) -> None:
    file = made.path / "index.json"
    for content in (file.read_bytes()[:-40], b"", b"\xff", b"[]", b"3", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.json is damaged: it (is not JSON|has no format)"):
            ShardIndex.load(made.path)
    file.unlink()
    with pytest.raises(ValueError, match=r"out holds no index\.json: make shards with `scaler convert SOURCE"):
        ShardIndex.load(made.path)
    with pytest.raises(ValueError, match="is no folder"):
        ShardIndex.load(made.path / "missing")


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    ShardIndex(tmp_path, shards=[ShardRecord("../x.tar", 1024, 1, "0" * 64)], class_names=[]).save()
    with pytest.raises(ValueError, match=r"not the name of a \.tar file"):
        ShardIndex.load(tmp_path)


def test_warning_for_shards_sorted_by_class(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=200, classes=4, size=8)
    convert(tmp_path / "src", tmp_path / "sorted", shuffle=False, shard_size="30KB", workers=1)
    convert(tmp_path / "src", tmp_path / "shuffled", shard_size="30KB", workers=1)
    convert(tmp_path / "src", tmp_path / "unlabelled", shuffle=False, labels=False, workers=1)
    make_image_folder(tmp_path / "single", num_images=60, classes=1, size=8)
    convert(tmp_path / "single", tmp_path / "single_out", shuffle=False, workers=1)
    assert "are sorted by class" in (sorted_by_class(ShardIndex.load(tmp_path / "sorted")) or "")
    with pytest.warns(UserWarning, match="are sorted by class .*convert again without --no-shuffle"):
        build_index(tmp_path / "sorted", workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("shuffled", "unlabelled", "single_out"):
            assert sorted_by_class(ShardIndex.load(tmp_path / name)) is None
            build_index(tmp_path / name, workers=1)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_no_warning_by_chance(tmp_path: Path, share: float) -> None:
    """Shuffled labels of two classes, one much rarer: thirty draws give no warning, sorted ones all do."""
    generator = np.random.default_rng(1)
    warned = []
    for number in range(30):
        labels = (generator.random(600) > share).astype(int)
        for ordered in (labels, np.sort(labels)):
            folder = tmp_path / f"{number}-{ordered is labels}"
            write_offsets(folder, ordered.tolist())
            warned.append((ordered is labels, sorted_by_class(ShardIndex.load(folder)) is not None))
    assert not any(found for shuffled, found in warned if shuffled)
    if share < 0.99:  # with six rare samples nothing can be told
        assert all(found for shuffled, found in warned if not shuffled)


def write_offsets(folder: Path, labels: list[int]) -> None:
    folder.mkdir()
    samples = [Sample(f"{i}", "jpg", 512 * i, 512, label, f"{i}.jpg", crc32=0) for i, label in enumerate(labels)]
    data = pack_offsets(samples, shard_name="s.tar", num_bytes=10**6, sha256="0" * 64, skipped=[])
    (folder / "s.offsets").write_bytes(data)
    ShardIndex(folder, shards=[ShardRecord("s.tar", 10**6, len(labels), "0" * 64)], class_names=["a", "b"]).save()
