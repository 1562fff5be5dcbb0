"""`TarStream` against Python's tarfile on archives of all formats, and on headers that lie."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.offsets import Skipped
from shards.tar import BLOCK, EMPTY, END, Member, TarStream, sample_files, scan_tar, ustar_header

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = {
    "file": [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE],
    "folder": [tarfile.DIRTYPE],
    "other": [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"V"],
}
KIND_OF = {kind: name for name, kinds in KINDS.items() for kind in kinds}


def stream(content: bytes, *, step: int = 1 << 20, known: bool = True) -> TarStream:
    """`content` in pieces of `step` bytes, all in one buffer that is overwritten, as readers have it."""

    def pieces() -> Iterator[memoryview]:
        buffer = bytearray(step)
        for start in range(0, len(content), step):
            size = len(content[start : start + step])
            buffer[:size] = content[start : start + step]
            yield memoryview(buffer)[:size]
            buffer[:] = b"\xaa" * step

    return TarStream(pieces(), name="s.tar", num_bytes=len(content) if known else None)


def member(name: str, data: bytes = b"", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT, **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, **options) as tar:  # type: ignore[call-overload]
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


NAMES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=30),
    st.lists(st.text("abé.-_ ", min_size=1, max_size=60), min_size=1, max_size=5).map("/".join),
    st.binary(min_size=1, max_size=120).map(lambda name: name.replace(b"\0", b"0").decode("utf-8", "surrogateescape")),
)
MEMBERS = st.tuples(
    NAMES,
    st.binary(max_size=1200),
    st.sampled_from([kind for kinds in KINDS.values() for kind in kinds] + 5 * [tarfile.REGTYPE]),
    st.sampled_from([0, 12, 3.25]),  # a fraction of a second takes a pax header
    st.one_of(st.just({}), st.just({"comment": "x" * 700, "SCHILY.xattr.user": "y\nz=1"})),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MEMBERS, max_size=6), st.sampled_from(FORMATS), st.sampled_from([64, 512, 1000, 1 << 16]))
def test_members_are_those_of_tarfile(members: list, format: int, step: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, errors="surrogateescape") as tar:
        for name, data, kind, mtime, pax in members:
            data = data if kind in KINDS["file"] or kind == b"V" else b""
            info = member(name, data, type=kind, linkname="l" * 130 if kind == tarfile.SYMTYPE else "x", mtime=mtime)
            info.pax_headers = pax if format == tarfile.PAX_FORMAT else {}
            try:
                header = info.tobuf(format, "utf-8", "surrogateescape")
            except ValueError:  # a name too long for ustar
                continue
            tar.fileobj.write(header + data + bytes(-len(data) % BLOCK))
            tar.offset += len(header) + len(data) + -len(data) % BLOCK
    content = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", errors="surrogateescape") as tar:
        expected = [(m.name, m.offset_data, m.size if m.isreg() else 0, KIND_OF[m.type]) for m in tar]
    for known in (True, False):
        found = []
        for m in stream(content, step=step, known=known):
            found.append(m)
        assert [(m.name.rstrip("/"), m.offset) for m in found] == [(row[0].rstrip("/"), row[1]) for row in expected]
        assert [m.kind for m in found] == [row[3] for row in expected]
        assert [m.size for m in found if m.kind == "file"] == [row[2] for row in expected if row[3] == "file"]
    tar_stream = stream(content, step=step)
    for m in tar_stream:
        data = content[m.offset : m.offset + m.size]
        assert (tar_stream.crc32() if m.offset % 1024 else zlib.crc32(tar_stream.contents())) == zlib.crc32(data)
        assert tar_stream.contents() == b""  # each byte once


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=3), st.sampled_from(FORMATS))
def test_flipped_bytes_give_members_or_one_line(edits: list[tuple[int, int]], format: int) -> None:
    long = "x" * 90 + "/" + "y" * 60 + ".jpg"
    content = bytearray(archive(*[(member(f"{i}{long}", b"abc" * 200), b"abc" * 200) for i in range(3)], format=format))
    for at, value in edits:
        content[at % len(content)] = value
    try:
        for m in stream(bytes(content)):
            assert 0 <= m.offset <= m.offset + m.size <= len(content)
    except ValueError as error:
        assert str(error).startswith("shard s.tar is cut off or damaged at byte") and "\n" not in str(error)


def resigned(header: bytes, **fields: tuple[int, bytes]) -> bytes:
    """A header with fields replaced by (position, bytes), and the checksum that goes with them."""
    block = bytearray(header)
    for at, value in fields.values():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


PLAIN = ustar_header("a.jpg", size=3)
BODY = b"abc" + bytes(509)


def pax(text: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    header = resigned(ustar_header("p", size=len(text) if size is None else size), kind=(156, kind))
    return header + text + bytes(-len(text) % BLOCK)


LIES = {
    "checksum": (PLAIN[:148] + b"000000\0 " + PLAIN[156:] + BODY + END, r"at byte 0 \(the checksum"),
    "second checksum": (2 * (PLAIN + BODY) + b"7" * 512 + END, "at byte 2048 .*checksum|a number belongs"),
    "a picture": (b"\xff\xd8\xff\xe0" + bytes(2000), r"begins with b'\\xff\\xd8.*no plain tar"),
    "compressed": (gzip.compress(PLAIN + BODY + END).ljust(600, b"x"), r"no plain tar"),
    "nothing": (b"", r"at byte 0 \(the file ends there"),
    "no end": (PLAIN + BODY, r"at byte 1024 \(the file ends"),
    "half a header": (PLAIN + BODY + PLAIN[:200], "the file ends"),
    "too long": (resigned(PLAIN, s=(124, b"00000020000\0")) + BODY + END, "'a.jpg' has 8192 bytes, 1536 follow"),
    "letters": (resigned(PLAIN, s=(124, b"12x\0")) + BODY + END, "holds b'12x.*where a number belongs"),
    "digits of another base": (resigned(PLAIN, s=(124, b"00000000009\0")) + BODY + END, "where a number belongs"),
    "negative": (resigned(PLAIN, s=(124, b"\xff" * 12)) + BODY + END, "where a number belongs"),
    "minus": (resigned(PLAIN, s=(124, b"-0000000003\0")) + BODY + END, "where a number belongs"),
    "huge": (resigned(PLAIN, s=(124, b"\x80" + b"\xff" * 11)) + BODY + END, r"'a.jpg' has 309485009821345068724781055"),
    "huge pax header": (pax(b"", size=2 << 20) + PLAIN + BODY + END, "an extended header of 2097152 bytes, at most"),
    "huge long name": (pax(b"", b"L", size=(1 << 33) - 1) + PLAIN + BODY + END, "extended header of 8589934591 bytes"),
    "endless name": (pax(b"n" * 5000, b"L") + PLAIN + BODY + END, "a name of 5000 characters"),
    "pax without length": (pax(b"path=x\n") + PLAIN + BODY + END, "a pax header is malformed"),
    "pax too long": (pax(b"99 path=x\n") + PLAIN + BODY + END, "a pax header is malformed"),
    "pax without end": (pax(b"9 path=xy") + PLAIN + BODY + END, "a pax header is malformed"),
    "pax size": (pax(b"14 size=\xc3\xa9\xc3\xa9\n") + PLAIN + BODY + END, "malformed|where a number belongs"),
    "pax negative size": (pax(b"11 size=-3\n") + PLAIN + BODY + END, "where a number belongs"),
    "pax size beyond": (pax(b"13 size=9999\n") + PLAIN + BODY + END, "'a.jpg' has 9999 bytes"),
    "pax size of many digits": (
        pax(b"5009 size=%s\n" % (b"9" * 4998)) + PLAIN + BODY + END,
        "malformed|number belongs",
    ),
    "one name for all": (pax(b"10 path=x\n", b"g") + PLAIN + BODY + END, "a global header that gives all"),
    "header for nothing": (pax(b"10 path=x\n") + END, "ends between a member's two headers"),
    "joined": (2 * (PLAIN + BODY + END), r"at byte 1536 \(the archive ends there, but more follows"),
    "an empty block within": (PLAIN + BODY + EMPTY + PLAIN + BODY + END, "more follows"),
    "an endless map": (resigned(PLAIN, k=(156, b"S"), e=(482, b"\1")) + b"\1" * 5120, "the file ends there"),
}


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("known", [True, False])
def test_headers_that_lie(kind: str, known: bool) -> None:
    content, words = LIES[kind]
    if not known:  # the size of a stream shows when it ends
        words = words if "' has " not in words else "the file ends there"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as caught:
            for _ in (tar := stream(content, known=known, step=4096)):
                tar.contents()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("shard s.tar is cut off or damaged at byte ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_unusual_but_right() -> None:
    """Signed checksums, binary sizes, blanks for zeros, a comment for all members, a name said twice."""
    name = "é.jpg".encode()
    signed = bytearray(resigned(PLAIN, n=(0, name.ljust(10, b"\0"))))
    signed[148:156] = b"%06o\0 " % (sum(signed[:148]) + sum(signed[156:]) + 256 - 2 * 256)
    binary = resigned(PLAIN, s=(124, b"\x80" + (3).to_bytes(11, "big")))
    blank = resigned(ustar_header("b.jpg", size=0), s=(124, b" " * 11 + b"\0"))
    both = pax(b"16 path=c/d.jpg\n") + pax(b"e.jpg\0", b"L")
    content = pax(b"16 comment=none\n", b"g") + bytes(signed) + BODY + binary + BODY + blank + both + PLAIN + BODY + END
    assert [(m.name, m.size) for m in stream(content)] == [("é.jpg", 3), ("a.jpg", 3), ("b.jpg", 0), ("c/d.jpg", 3)]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.size) for m in tar] == [("é.jpg", 3), ("a.jpg", 3), ("b.jpg", 0), ("c/d.jpg", 3)]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_files_are_named_and_passed_over(tmp_path: Path, format: str) -> None:
    with open(tmp_path / "holes.jpg", "wb") as file:
        for i in range(30):  # more than the four pieces that a header has room for
            file.seek(i << 20)
            file.write(b"x" * 5000)
    (tmp_path / "z.jpg").write_bytes(b"after")
    command = ["tar", "-C", tmp_path, "--sparse", f"--format={format}", "-cf", tmp_path / "s.tar", "holes.jpg", "z.jpg"]
    subprocess.run(command, check=True)
    if os.path.getsize(tmp_path / "s.tar") > 1 << 20:
        pytest.skip("this file system keeps no holes")
    samples, skipped = scan_tar(stream((tmp_path / "s.tar").read_bytes()), image_extensions=["jpg"])
    assert [sample.key for sample in samples] == ["z"]
    assert [why for _, why in skipped] == ["a link, a sparse or a special file"]


def test_names_that_are_no_samples() -> None:
    names = ["d/._a.jpg", "d/a.jpg", "d/._b.jpg", "d/b.jpg", ".hidden.jpg", "__meta__/x.jpg", "README", "d/c.jpg"]
    skipped: list[Skipped] = []
    tar = stream(archive(*[(member(name, b"1"), b"1") for name in names]))
    assert [key for key, _, _ in sample_files(tar, skipped=skipped)] == ["d/a", "d/b", "d/c"]
    assert [name for name, _ in skipped] == ["d/._a.jpg", "d/._b.jpg", ".hidden.jpg", "__meta__/x.jpg", "README"]


@pytest.mark.parametrize("text", [b"", b"1_0", b"0x1", b"1.0", b"\xd9\xa3", b"1" * 40, b"99999999999", b"-2", b"1 2"])
def test_labels_that_are_none(text: bytes) -> None:
    content = archive((member("a.jpg"), b""), (member("a.cls", text), text))
    with pytest.raises(ValueError, match=r"'a\.cls' holds b'.*', which is no class number") as caught:
        scan_tar(stream(content), image_extensions=["jpg"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "label"), [(b"0", 0), (b"007\n", 7), (b" 12 ", 12), (b"-1", -1)])
def test_labels(text: bytes, label: int) -> None:
    content = archive((member("a.cls", text), text), (member("a.jpg", b"x"), b"x"))
    (sample,), skipped = scan_tar(stream(content), image_extensions=["jpg"])
    assert (sample.label, sample.crc32, sample.size, skipped) == (label, zlib.crc32(b"x"), 1, [])


def test_an_own_header_is_a_member() -> None:
    assert list(stream(PLAIN + BODY + END)) == [Member("a.jpg", 512, 3, "file")]


def test_images_that_no_memory_should_be_given_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.tar.MAX_IMAGE_BYTES", 2)
    content = archive(*[(member(f"{size}.jpg", b"x" * size), b"x" * size) for size in (2, 3)])
    samples, skipped = scan_tar(stream(content), image_extensions=["jpg"])
    assert [sample.key for sample in samples] == ["2"]
    assert skipped == [("3", "its image has 3 bytes, at most 2 are read")]
