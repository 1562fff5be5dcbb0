"""Offset files give back what went in, and a damaged one is a ValueError whatever the damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.offsets import Sample, load_offsets, offset_path, pack_offsets, read_header

SHARD_BYTES = 1 << 40
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ON_DISK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def a_sample(draw: st.DrawFn) -> Sample:
    size = draw(st.integers(0, SHARD_BYTES))
    key, extension = draw(TEXT), draw(st.sampled_from(["jpg", "jpeg", "png", "webp", "seg.png"]))
    source = draw(st.one_of(st.just(f"{key}.{extension}"), TEXT, st.just("caf\udce9.jpg")))
    return Sample(
        key,
        extension,
        draw(st.integers(0, SHARD_BYTES - size)),
        size,
        draw(st.integers(-1, 1 << 40)),
        source,
        draw(st.integers(0, (1 << 32) - 1)),
    )


def pack(samples: list[Sample], skipped: list[tuple[str, str]] | None = None) -> bytes:
    return pack_offsets(samples, shard_name="s.tar", num_bytes=SHARD_BYTES, sha256="0" * 64, skipped=skipped or [])


@ON_DISK
@given(samples=st.lists(a_sample(), max_size=20), skipped=st.lists(st.tuples(TEXT, TEXT), max_size=3))
def test_round_trip(tmp_path: Path, samples: list[Sample], skipped: list[tuple[str, str]]) -> None:
    file = tmp_path / "s.offsets"
    file.write_bytes(pack(samples, skipped))
    table = load_offsets(file)
    assert [table.sample(i) for i in range(len(table))] == samples
    assert [table.key(i) for i in range(len(table))] == [sample.key for sample in samples]
    assert table.labels.tolist() == [sample.label for sample in samples]
    assert table.skipped == read_header(file)["skipped"] == skipped
    assert (table.shard_name, table.num_bytes, table.sha256) == ("s.tar", SHARD_BYTES, "0" * 64)


@ON_DISK
@given(data=st.data(), samples=st.lists(a_sample(), max_size=5))
def test_damage_is_a_value_error(tmp_path: Path, data: st.DataObject, samples: list[Sample]) -> None:
    content = bytearray(pack(samples))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    file = tmp_path / "s.offsets"
    file.write_bytes(content[:cut])
    try:
        table = load_offsets(file)
    except ValueError as error:
        assert str(file) in str(error) and "scaler index" in str(error) and "\n" not in str(error)
        return
    for i in range(len(table)):
        sample = table.sample(i)
        assert 0 <= sample.offset <= sample.offset + sample.size <= table.num_bytes
        assert sample.label >= -1


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"[1]\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"\0" * 99])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.offsets").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or missing"):
        load_offsets(tmp_path / "s.offsets")


def test_missing_file_and_name() -> None:
    assert offset_path(Path("folder/name-000001.tar")) == Path("folder/name-000001.offsets")
    with pytest.raises(ValueError, match=r"offset file nowhere/a\.offsets is damaged or missing: No such file"):
        load_offsets(Path("nowhere/a.offsets"))
