"""`verify` finds nothing in what convert and index made, and names whatever was done to it afterwards."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shards.convert import convert
from shards.index import ShardIndex
from shards.indexing import build_index
from shards.offsets import Sample, load_offsets, offset_path, pack_offsets
from shards.verify import FileReport, verify
from tests.images import make_image_folder

FIRST, SECOND = "shard-000000.tar", "shard-000001.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images in a handful of shards."""
    make_image_folder(tmp_path / "src", num_images=20, format="mixed")
    convert(tmp_path / "src", tmp_path / "out", shard_size="25KB", workers=1)
    return tmp_path / "out"


def problems(folder: Path, **options: bool) -> dict[str, list[str]]:
    return {report.name: report.problems for report in verify(folder, workers=1, **options) if report.problems}


def test_what_was_made_is_right(folder: Path) -> None:
    index = ShardIndex.load(folder)
    expected = [
        FileReport(name, int(samples), int(size), [])
        for name, samples, size in zip(index.shard_names, index.shard_sizes, index.shard_bytes, strict=True)
    ]
    assert len(expected) > 2
    assert verify(folder, workers=1) == verify(folder, workers=2, decode=True) == expected


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_offsets(folder: Path, edit: Callable[[Sample], Sample]) -> None:
    """Change the first sample of the first shard in its offset file, checksum and all."""
    path = offset_path(folder / FIRST)
    table = load_offsets(path)
    samples = [table.sample(i) for i in range(len(table))]
    samples[0] = edit(samples[0])
    fields = {"shard_name": FIRST, "num_bytes": table.num_bytes, "sha256": table.sha256, "skipped": table.skipped}
    path.write_bytes(pack_offsets(samples, **fields))


def first(folder: Path) -> Sample:
    return load_offsets(offset_path(folder / FIRST)).sample(0)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped bit of an image": (
        lambda folder: change(folder / FIRST, first(folder).offset + 100),
        [r"1 of \d+ images are damaged \(their crc32 differs\): copy the shard again \('class_", "its sha256 is"],
    ),
    "a flipped bit of padding": (
        lambda folder: change(folder / FIRST, (folder / FIRST).stat().st_size - 5),
        ["the archive ends there, but more follows"],
    ),
    "a flipped bit of a header": (
        lambda folder: change(folder / FIRST, first(folder).offset - 512),
        [f"shard .*{FIRST} is cut off or damaged at byte 0 .the checksum"],
    ),
    "cut off": (
        lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:5000]),
        [rf"{FIRST} was cut off: 5000 bytes, index.json says \d+; copy it again", "is cut off or damaged at byte"],
    ),
    "longer": (
        lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + bytes(512)),
        [f"{FIRST} has changed: .* bytes, index.json", f"{FIRST} has changed: its sha256 .*scaler index"],
    ),
    "missing": (
        lambda folder: (folder / FIRST).unlink(),
        [f"shard .*{FIRST} is missing; copy it again .*or run `scaler index"],
    ),
    "another shard's bytes": (
        lambda folder: (folder / FIRST).write_bytes((folder / SECOND).read_bytes()),
        [FIRST, "samples are not where", "samples are not in the offset file", "sha256"],
    ),
    "no offset file": (
        lambda folder: offset_path(folder / FIRST).unlink(),
        ["offset file .* cannot be read: No such file.*; `scaler index .*` makes it anew"],
    ),
    "a flipped bit of the offset file": (
        lambda folder: change(offset_path(folder / FIRST), -3),
        [r"offset file .* is damaged or missing: .*crc32.*scaler index"],
    ),
    "another shard's offset file": (
        lambda folder: offset_path(folder / FIRST).write_bytes(offset_path(folder / SECOND).read_bytes()),
        ["offset file .* does not belong to index.json .*scaler index"],
    ),
    "an offset": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, offset=sample.offset + 512)),
        [r"1 of \d+ samples are not where the offset file says: `scaler index .*` makes it anew \('class"],
    ),
    "a size": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, size=sample.size - 1)),
        [r"1 of \d+ samples are not where"],
    ),
    "a key": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, key="other")),
        [r"1 of \d+ samples are not where .*'other'", "1 samples are not in the offset file"],
    ),
    "a label": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, label=(sample.label + 1) % 3)),
        [r"1 of \d+ labels are not those of the shard"],
    ),
    "a label without class": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, label=7)),
        ["offset file .* has label 7, index.json names 3 classes"],
    ),
    "a crc32": (
        lambda folder: edit_offsets(folder, lambda sample: replace(sample, crc32=sample.crc32 ^ 1)),
        [r"1 of \d+ images are damaged"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(folder: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    found = problems(folder)
    assert list(found) == [FIRST]
    assert all("\n" not in line for line in found[FIRST])
    text = "\n".join(found[FIRST])
    for expected in words:
        assert re.search(expected, text), text


def test_files_that_should_not_be_there(folder: Path) -> None:
    (folder / "extra.tar").write_bytes((folder / FIRST).read_bytes())
    (folder / "gone.offsets").write_bytes(offset_path(folder / FIRST).read_bytes())
    (folder / "notes.txt").write_text("of the user")
    found = problems(folder)
    assert list(found) == ["extra.tar", "gone.offsets"]
    assert "not listed in index.json; `scaler index" in found["extra.tar"][0] and "remove it" in found["extra.tar"][0]
    assert "belongs to no shard there: remove it" in found["gone.offsets"][0]


def test_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    """Bytes as they were indexed are no damage, but `decode` says what training will replace."""
    make_image_folder(tmp_path / "src", num_images=4, classes=0)
    files = sorted((tmp_path / "src").iterdir())
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for i, file in enumerate(files):
            data = file.read_bytes()[: 900 if i == 1 else None] if i != 2 else b"text"
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{i}.json")
            archive.addfile(info)
    build_index(tmp_path, workers=1)
    assert problems(tmp_path) == {}
    first, second = problems(tmp_path, decode=True)["s.tar"]
    assert first.startswith("image '1' cannot be decoded (") and "truncated" in first
    assert second.startswith("image '2' cannot be decoded (not a JPEG, PNG or WebP image")
    assert "training replaces it" in second


def test_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no index\.json.*scaler index"):
        verify(tmp_path)
