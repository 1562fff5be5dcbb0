"""Sources other than folders: lists of files, and shards that are laid out anew."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from shards.convert import convert
from shards.index import ShardIndex
from shards.indexing import build_index
from tests.images import encode_image, make_image_folder, make_pixels


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """source → (image, label) of all samples of a local index, read by their positions."""
    index = ShardIndex.load(folder)
    found = {}
    for entry in map(index.entry, range(index.num_samples)):
        data = (folder / index.shard_names[entry.shard]).read_bytes()
        found[entry.source] = data[entry.offset : entry.offset + entry.size], entry.label
    assert len(found) == index.num_samples
    return found


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_image_folder(tmp_path / "src", num_images=12, classes=["b", "a", "c"], format="mixed")
    return tmp_path / "src"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_says_which_files_and_labels(photos: Path, tmp_path: Path, kind: str) -> None:
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))[:7]
    names = ["wolf", "ape", "wolf", "ape", "cow", "ape", "wolf"]
    if kind == "csv":
        table = write_csv(tmp_path / "list.csv", [("label", "path", "other"), *zip(names, files, files, strict=True)])
    else:
        table = tmp_path / "list.parquet"
        parquet.write_table(pyarrow.table({"other": files, "path": files, "label": names}), table)
    report = convert(photos, tmp_path / "out", from_list=table, workers=1, shuffle=False)
    assert (report.num_samples, report.class_names) == (7, ["ape", "cow", "wolf"])
    index = ShardIndex.load(tmp_path / "out")
    assert [index.entry(i).source for i in range(7)] == files, "without shuffling: the list's order"
    assert contents(tmp_path / "out") == {
        file: ((photos / file).read_bytes(), ["ape", "cow", "wolf"].index(name))
        for file, name in zip(files, names, strict=True)
    }
    unlabelled = convert(photos, tmp_path / "plain", from_list=table, workers=1, labels=False)
    assert unlabelled.class_names == [] and ShardIndex.load(tmp_path / "plain").labels([0]).tolist() == [-1]


def test_labels_that_are_numbers_stay_these(photos: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))[:3]
    parquet.write_table(pyarrow.table({"path": files, "label": [4, 0, 2]}), tmp_path / "list.parquet")
    report = convert(photos, tmp_path / "out", from_list=tmp_path / "list.parquet", workers=1, shuffle=False)
    assert report.class_names == ["0", "1", "2", "3", "4"]
    assert ShardIndex.load(tmp_path / "out").labels(range(3)).tolist() == [4, 0, 2]


def test_every_row_of_a_list_is_accounted_for(photos: Path, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "elsewhere", num_images=1, classes=0)
    (photos / "notes.txt").write_text("")
    good = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("image*"))[:3]
    rows = [
        (good[0], "1"), (str(photos / good[1]), "0"), (f"a/../{good[2]}", "1"), (good[0], "1"), (good[1], "1"),
        ("a/missing.jpg", "0"), ("../elsewhere/image_00000.jpg", "0"), ("notes.txt", "0"), ("a/nul\0.jpg", "0"),
    ]  # fmt: skip
    table = write_csv(tmp_path / "list.csv", [("path", "label"), *rows])
    report = convert(photos, tmp_path / "out", from_list=table, workers=1)
    assert {source: label for source, (_, label) in contents(tmp_path / "out").items()} == dict(
        zip(good, (1, 0, 1), strict=True)
    )
    assert report.ignored == [(good[0], "listed more than once")]
    assert report.rejected == sorted(
        [
            (good[1], "listed again with another label; the first one counts"),
            ("a/missing.jpg", "unreadable: No such file or directory"),
            ("../elsewhere/image_00000.jpg", f"lies outside of {photos}"),
            ("notes.txt", "not an image ending"),
            ("a/nul\\x00.jpg", "unreadable: embedded null byte"),
        ]
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "path\na.jpg\n", "neither a .csv nor a .parquet"),
        ("list.csv", "file,label\na.jpg,1\n", "has no column path, but file, label; its first row names them"),
        ("list.csv", "", "has no column path, but none"),
        ("list.csv", "path\n", "lists no files"),
        ("list.csv", "path,label\na.jpg,1\nb.jpg\n", "list.csv, line 3: 1 fields where the first row has 2"),
        ("list.csv", "path,label\na.jpg,1\nb.jpg,\n", "row 2: no label; give all files one"),
        ("list.csv", "path,label\na.jpg,99999999\n", "label 99999999; class numbers count from 0, to at most 9999999"),
        ("list.csv", "path\nmissing.jpg\n", r"none of the 1 files .* can be used; the first, missing.jpg: unreadable"),
        ("list.parquet", "no parquet", "cannot read .*list.parquet: "),
    ],
)
def test_wrong_lists(photos: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        convert(photos, tmp_path / "out", from_list=tmp_path / name, workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_list_and_missing_pyarrow(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*x\.csv: No such file or directory"):
        convert(photos, tmp_path / "out", from_list=tmp_path / "x.csv", workers=1)
    program = (
        "import sys; sys.modules['pyarrow'] = None\nfrom shards.convert import convert\n"
        "try: convert(sys.argv[1], sys.argv[2], from_list='list.parquet')\nexcept ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", program, photos, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "reading list.parquet takes pyarrow: pip install 'scaler[parquet]' (or give a .csv file)\n"


def webdataset_shards(folder: Path, *, num_samples: int = 30) -> dict[str, tuple[bytes, int]]:
    """Shards by webdataset's own writer, with captions and JSON; key → (image, label)."""
    folder.mkdir(parents=True)
    found = {}
    with webdataset.ShardWriter(f"{folder}/wds-%04d.tar", maxcount=8, verbose=0) as writer:
        for i in range(num_samples):
            kind = ["jpg", "png", "webp"][i % 3]
            data = encode_image(make_pixels(30 + i, 40, seed=i), format=kind.replace("jpg", "jpeg"))
            sample = {"__key__": f"set/{i:04d}", kind: data, "txt": f"number {i}", "cls": i % 4}
            writer.write(sample | ({"json": {"caption": f"number {i}", "width": -1}} if i % 2 else {}))
            found[f"set/{i:04d}.{kind}"] = data, i % 4
    return found


@pytest.mark.parametrize("form", ["folder", "braces", "one by one"])
def test_shards_of_others_are_laid_out_anew(tmp_path: Path, form: str) -> None:
    wanted = webdataset_shards(tmp_path / "wds")
    source = {
        "folder": str(tmp_path / "wds"),
        "braces": f"{tmp_path}/wds/wds-{{0000..0003}}.tar",
        "one by one": f"{{{','.join(map(str, sorted((tmp_path / 'wds').glob('*.tar'))))}}}",
    }[form]
    report = convert(source, tmp_path / "out", shard_size="20KB", workers=2, json_member=form == "braces")
    assert (report.num_samples, report.class_names, report.rejected) == (30, ["0", "1", "2", "3"], [])
    assert contents(tmp_path / "out") == wanted
    index = ShardIndex.load(tmp_path / "out")
    order = index.keys(range(30))
    assert order != sorted(order) and sorted(order) == sorted(name.partition(".")[0] for name in wanted)
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        number = int(sample["__key__"][-4:])
        assert ("json" in sample) == (form == "braces")
        if "json" in sample:
            about = json.loads(sample["json"])
            assert (about["width"], about["height"]) == (30 + number, 40)
            assert about.get("caption") == (f"number {number}" if number % 2 else None)
    in_order = convert(source, tmp_path / "ordered", workers=1, shuffle=False)
    assert in_order.num_samples == 30 and ShardIndex.load(tmp_path / "ordered").keys(range(30)) == sorted(order)


def test_our_own_shards_keep_names_sources_and_bytes(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "one", shard_size="10KB", workers=1)
    again = convert(tmp_path / "one", tmp_path / "two", shard_size="20KB", seed=5, workers=2)
    assert again.class_names == ["a", "b", "c"] and again.num_samples == 12
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    back = convert(tmp_path / "two", tmp_path / "three", workers=1, labels=False, val_fraction=0.25)
    assert back.class_names == [] and back.splits == {"train": 9, "val": 3}


def test_gnu_tar_with_repeated_keys_and_what_is_no_image(tmp_path: Path) -> None:
    for number in range(2):
        make_image_folder(tmp_path / "src", num_images=3, classes=0, seed=number)
        (tmp_path / "src/notes.txt").write_text("notes")
        (tmp_path / f"wds{number}").mkdir()
        subprocess.run(["tar", "cf", tmp_path / f"wds{number}/a.tar", "-C", tmp_path / "src", "."], check=True)
    report = convert(f"{tmp_path}/wds{{0,1}}/a.tar", tmp_path / "out", workers=1)
    keys = [f"./image_0000{i}" for i in range(3)]
    assert sorted(ShardIndex.load(tmp_path / "out").keys(range(6))) == sorted(
        ["x" + key for key in keys] + ["x" + key + "-2" for key in keys]
    )
    assert (report.num_samples, report.class_names) == (6, []) and len(report.ignored) == 2
    with pytest.raises(ValueError, match="6 of 6 samples have no label"):
        convert(f"{tmp_path}/wds{{0,1}}/a.tar", tmp_path / "labelled", workers=1, labels=True)


def test_a_run_on_shards_continues_and_notices_changes(tmp_path: Path) -> None:
    webdataset_shards(tmp_path / "wds")
    build_index(tmp_path / "wds", workers=1)
    convert(tmp_path / "wds", tmp_path / "out", shard_size="20KB", workers=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name in ("shard-000001.offsets", "index.json"):
        (tmp_path / "out" / name).unlink()
    report = convert(tmp_path / "wds", tmp_path / "out", shard_size="20KB", workers=1)
    assert report.num_skipped_finished == report.num_shards - 1 > 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    shard = tmp_path / "wds/wds-0001.tar"  # a byte of a picture flips after it was indexed
    data = bytearray(shard.read_bytes())
    entry = next(e for e in map(ShardIndex.load(tmp_path / "wds").entry, range(30)) if e.shard == 1)
    data[entry.offset + entry.size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard .*wds-0001\.tar is damaged: .* copy it again"):
        convert(tmp_path / "wds", tmp_path / "other", workers=1)


def test_wrong_shards(tmp_path: Path) -> None:
    webdataset_shards(tmp_path / "wds", num_samples=2)
    for source, message in {
        "pipe:cat a.tar": "is a command, which convert does not run",
        f"{tmp_path}/wds/missing.tar": "cannot read shard .*missing.tar: No such file",
        f"{tmp_path}/wds/wds-{{0000..0003}}.tar": "cannot read shard .*wds-0001.tar: No such file",
        f"{tmp_path}/{{a": "unbalanced|is not a folder|write for example",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            convert(source, tmp_path / "out", workers=1)
        assert "\n" not in str(error.value)
    make_image_folder(tmp_path / "labelled", num_images=4)
    convert(tmp_path / "labelled", tmp_path / "named", workers=1)
    with pytest.raises(ValueError, match="name their classes differently; convert them one at a time"):
        convert(f"{tmp_path}/{{wds/wds-0000,named/shard-000000}}.tar", tmp_path / "out", workers=1)
    (tmp_path / "named/index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        convert(tmp_path / "named", tmp_path / "out", workers=1)
    (tmp_path / "json").mkdir()
    with webdataset.TarWriter(str(tmp_path / "json/a.tar")) as writer:
        for i, text in enumerate(["[1]", "{", '{"a": 1}']):
            writer.write({"__key__": f"{i}", "jpg": encode_image(make_pixels(20, 20, seed=i)), "json": text.encode()})
    report = convert(tmp_path / "json", tmp_path / "out", workers=1, json_member=True)
    assert report.rejected == [("0.jpg", "its JSON member is no object"), ("1.jpg", "its JSON member is no JSON")]


def test_a_folder_of_images_in_which_a_tar_lies_is_one_of_images(photos: Path, tmp_path: Path) -> None:
    (photos / "backup.tar").write_bytes(b"")
    report = convert(photos, tmp_path / "out", workers=1)
    assert report.num_samples == 12 and report.ignored == [("backup.tar", "not an image ending")]
