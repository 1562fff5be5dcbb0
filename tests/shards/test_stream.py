"""Streams without an index: what is drawn, what is shown, what is refused, and errors where there would be no end."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset

from shards.decode import View, decode_views
from shards.stream import StreamLoader, expand_sources, sources_fingerprint
from tests.http import nginx
from tests.images import encode_image, make_pixels

VIEWS = [View("crop", 16, count=2)]
NUM = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four pictures by webdataset's own writer, with labels."""
    folder = tmp_path_factory.mktemp("stream")
    with webdataset.ShardWriter(str(folder / "s-%d.tar"), maxcount=NUM // 3, verbose=0) as writer:
        for i in range(NUM):
            data = encode_image(make_pixels(30 + i, 30, seed=i))
            writer.write({"__key__": f"k{i}", "jpg": data, "cls": i % 5, "json": {"i": i}})
    return folder


def write(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def loader(*sources: str, pipes: bool = False, **options: object) -> StreamLoader:
    values = {"views": VIEWS, "seed": 1, "global_batch_size": 8, "micro_batch_size": 4, "stop": 48, **options}
    return StreamLoader(expand_sources("::".join(sources), allow_pipes=pipes), **values)  # type: ignore[arg-type]


def labels(batches: StreamLoader) -> list[int]:
    return [label for batch in batches for label in batch["labels"].tolist()]


def test_batches_are_those_of_the_indexed_loader(folder: Path) -> None:
    batches = list(loader(f"{folder}/s-{{0..2}}.tar", start=16))
    assert len(batches) == 2 * 4
    for number, batch in enumerate(batches):
        first = 16 + 8 * (number // 2)
        assert batch["positions"].tolist() == list(range(4 * (number % 2), 4 * (number % 2) + 4))
        assert batch["ids"].tolist() == [first + position for position in batch["positions"].tolist()]
        assert batch["epochs"].tolist() == [0] * 4 and batch["rejected"] == []
        assert (batch["global_batch_size"], batch["image_number"]) == (8, first)
        assert batch["views"]["crop"].shape == (2, 4, 3, 16, 16) and batch["views"]["crop"].dtype == torch.uint8
        assert set(batch["labels"].tolist()) <= set(range(5))
        assert set(batch["seconds"]) == {"read", "decode", "resize"} and all(v > 0 for v in batch["seconds"].values())


def test_pixels_are_those_of_the_picture_and_its_position(folder: Path, tmp_path: Path) -> None:
    """One picture again and again: every position in the stream cuts it in its own way, by the usual keys."""
    data = encode_image(make_pixels(50, 40, seed=3))
    source = write(tmp_path / "one.tar", [("a.jpg", data), ("a.cls", b"3")])
    for batch in loader(source, stop=16):
        for row, id in enumerate(batch["ids"].tolist()):
            expected = decode_views(data, views=VIEWS, seed=1, epoch=0, sample_id=id)["crop"]
            assert torch.equal(batch["views"]["crop"][:, row], expected)
        assert batch["labels"].tolist() == [3] * 4


def test_drawn_with_replacement_by_seed_rank_worker_and_start(folder: Path) -> None:
    source = f"{folder}/s-{{0..2}}.tar"
    options = {"shuffle_window": 8, "stop": 400}
    drawn = labels(loader(source, **options))
    assert labels(loader(source, **options)) == drawn
    again = loader(source, **options)
    assert labels(again) == labels(again)  # each iteration begins at `start`
    assert set(Counter(drawn)) == set(range(5))
    others = [
        labels(loader(source, **{**options, "seed": 2})),
        labels(loader(source, **{**options, "start": 8, "stop": 408})),
        labels(loader(source, **{**options, "shuffle_window": 1})),
    ]
    second = labels(loader(source, rank=1, world_size=2, shuffle_window=8, stop=800))
    assert all(a != b for a, b in itertools.combinations([drawn, *others, second], 2))


def test_workers_draw_independently(folder: Path) -> None:
    source = f"{folder}/s-{{0..2}}.tar"
    batches = list(loader(source, num_workers=2, stop=32))
    assert [batch["ids"][0].item() for batch in batches] == list(range(0, 32, 4))
    assert labels(loader(source, num_workers=2, stop=32)) == [x for batch in batches for x in batch["labels"].tolist()]
    first, second = ([x for batch in batches[w::2] for x in batch["labels"].tolist()] for w in (0, 1))
    assert first != second


def test_what_cannot_be_shown_is_replaced_and_named(tmp_path: Path) -> None:
    good = encode_image(make_pixels(30, 30, seed=0))
    members = [("a.jpg", good[:300]), ("b.txt", b"t"), ("c.jpg", good), ("c.cls", b"1"), ("d.jpg", b"")]
    source = write(tmp_path / "s.tar", members)
    (first, *_) = loader(source, stop=8, micro_batch_size=8)
    assert first["labels"].tolist() == [1] * 8
    records = first["rejected"]
    assert records[0] == {
        "image": 0,
        "epoch": 0,
        "id": 0,
        "key": "a",
        "source": "a.jpg",
        "shard": source,
        "reason": records[0]["reason"],
        "replacement_id": 0,
        "replacement_key": "c",
    }
    assert {(row["key"], row["reason"].split(" (")[0]) for row in records[1:3]} == {
        ("b", "no image among its members"),
        ("d", "file is empty"),
    }


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(folder: Path, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "s.tar.x").write_bytes(pack((folder / "s-0.tar").read_bytes()))
    assert labels(loader(str(tmp_path / "s.tar.x"))) == labels(loader(str(folder / "s-0.tar")))


def test_pipes_run_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/ran && cat {folder}/s-0.tar"
    for source in (command, f"{folder}/s-0.tar::{command}", f" {command}", command.replace("pipe", "PIPE")):
        with pytest.raises(ValueError, match=r"is a command, .*set data\.allow_pipes=true") as caught:
            loader(source)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert labels(loader(command, pipes=True)) == labels(loader(f"{folder}/s-0.tar"))
    assert (tmp_path / "ran").exists()


def test_the_environment_cannot_make_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{folder}/=pipe:cat {folder}/")
    monkeypatch.setenv("WDS_x", "pipe:true")
    for source in (f"{folder}/s-0.tar", "${x}"):
        with pytest.raises(ValueError, match="is a command"):
            loader(source)


def test_other_schemes_are_opened_by_fsspec(folder: Path) -> None:
    import fsspec

    with fsspec.open("memory://stream/s.tar", "wb") as file:
        file.write((folder / "s-0.tar").read_bytes())
    assert labels(loader("memory://stream/s.tar")) == labels(loader(f"{folder}/s-0.tar"))
    assert labels(loader(f"file:{folder}/s-0.tar")) == labels(loader(f"{folder}/s-0.tar"))


def test_over_http(folder: Path) -> None:
    with nginx(folder) as server:
        assert labels(loader(f"{server.url}/s-{{0..2}}.tar")) == labels(loader(f"{folder}/s-{{0..2}}.tar"))
        with pytest.raises(ValueError, match=f"^cannot read shard {server.url}/none.tar: .*exit 22") as caught:
            labels(loader(f"{server.url}/none.tar?signature=hunter2"))
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


SOURCES: dict[str, tuple[str, str]] = {
    "missing": ("TMP/nothing.tar", "cannot read shard TMP/nothing.tar: .*No such file"),
    "cut off": ("TMP/cut.tar", "shard TMP/cut.tar is cut off or damaged at byte"),
    "damaged": ("TMP/header.tar", r"shard TMP/header\.tar is cut off or damaged at byte \d+ .the checksum"),
    "cut off and compressed": ("TMP/cut.tar.gz", "cannot read shard TMP/cut.tar.gz: Compressed file ended"),
    "a picture": ("TMP/picture.jpg", "picture.jpg is cut off or damaged at byte 0 .it begins with"),
    "empty": ("TMP/empty.tar", "TMP/empty.tar and the 99 before it hold no samples"),
    "no pictures": ("TMP/text.tar", "TMP/text.tar: '[ab]', like the 999 before it: no image among its members .txt."),
    "twice": ("TMP/twice.tar", r"TMP/twice.tar holds 'a.JPG' twice"),
    "label": ("TMP/label.tar", r"TMP/label.tar: 'a.cls' holds b'dog', which is no class number"),
    "scheme": ("nosuch://x/s.tar", "cannot read shard nosuch://x/s.tar: "),
    "failing command": ("pipe:cat TMP/s.tar; exit 3", "cannot read shard pipe:cat .*exit 3"),
    "no command": ("pipe:false", "cannot read shard pipe:false: .*exit 1"),
    "secret": (
        "http://user:hunter2@127.0.0.1:9/s.tar?sig=hunter2",
        "cannot read shard http://127.0.0.1:9/s.tar: .*exit",
    ),
}


@pytest.mark.parametrize(
    ("kind", "num_workers"), [*((kind, 0) for kind in SOURCES), ("cut off", 1), ("failing command", 1)]
)
def test_sources_that_fail(folder: Path, tmp_path: Path, kind: str, num_workers: int) -> None:
    content = (folder / "s-0.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content)
    (tmp_path / "cut.tar").write_bytes(content[:3000])
    header = content.index(b"k1.jpg")
    (tmp_path / "header.tar").write_bytes(content[: header + 1] + b"9" + content[header + 2 :])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(content)[:2000])
    (tmp_path / "picture.jpg").write_bytes(encode_image(make_pixels(30, 30, seed=0)))
    picture = encode_image(make_pixels(9, 9, seed=0))
    write(tmp_path / "empty.tar", [])
    write(tmp_path / "text.tar", [("a.txt", b"t"), ("b.txt", b"t")])
    write(tmp_path / "twice.tar", [("a.jpg", picture), ("a.JPG", picture)])
    write(tmp_path / "label.tar", [("a.jpg", picture), ("a.cls", b"dog")])
    source, message = (text.replace("TMP", str(tmp_path)) for text in SOURCES[kind])
    batches = loader(source, pipes=True, num_workers=num_workers)
    with pytest.raises(ValueError, match=message) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_lists_that_name_nothing(tmp_path: Path) -> None:
    for source, message in (
        ("", "names no shards; write for example"),
        ("a-{0..3.tar", "cannot be expanded"),
        ("${nowhere}", "cannot be expanded: missing environment variable .*nowhere"),
        (str(tmp_path), "is no shard; name some, as .*data.reader=indexed"),
        ("-", "'-' is no shard"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            expand_sources(source, allow_pipes=False)
        assert "\n" not in str(caught.value)


def test_fingerprints_leave_secrets_out() -> None:
    one, two = (sources_fingerprint([f"https://user:{x}@host/s.tar?signature={x}"]) for x in "ab")
    assert one == two != sources_fingerprint(["https://host/t.tar"])
