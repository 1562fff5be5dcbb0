"""Our writer's files are what the safetensors package reads, and the other way round; damage is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scaler.checkpoint.container import CODES, lay_out, read_header, sha256_of, write_stream
from shards.places import LocalFolder


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    header, order = lay_out({k: (t.dtype, t.shape) for k, t in tensors.items()}, metadata=metadata)
    with LocalFolder(path.parent).writing(path.name) as append:
        data = (tensors[key].reshape(-1).view(torch.uint8).numpy() for key in order)
        written = write_stream(append, [header, *data])
    assert written.size == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.sha256 == sha256_of(LocalFolder(path.parent), path.name, size=written.size)


def test_the_safetensors_package_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}"[6:]: torch.randint(0, 2, (3, i + 1), generator=generator).to(dtype) for i, dtype in enumerate(CODES)
    }
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "Umlaut ä": torch.arange(100_000)}
    write(tmp_path / "ours.safetensors", tensors, step="7")
    save_file(tensors, tmp_path / "theirs.safetensors")
    loaded = load_file(tmp_path / "ours.safetensors")
    assert loaded.keys() == tensors.keys()
    for name in ("ours.safetensors", "theirs.safetensors"):
        content = (tmp_path / name).read_bytes()
        header = read_header(LocalFolder(tmp_path), name, size=len(content))
        assert header.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(loaded[key], tensor) and header[key].dtype == tensor.dtype
            assert header[key].shape == tuple(tensor.shape)
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[header[key].start : header[key].stop] == raw
    ours = read_header(LocalFolder(tmp_path), "ours.safetensors", size=(tmp_path / "ours.safetensors").stat().st_size)
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in ours.values())


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}
    size = (tmp_path / "none.safetensors").stat().st_size
    assert read_header(LocalFolder(tmp_path), "none.safetensors", size=size) == {}


def test_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a is torch.complex64; checkpoints hold float64, .*bool"):
        lay_out({"a": (torch.complex64, (1,))})


def field(**changes: object) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()
    return len(text).to_bytes(8, "little") + text


BAD = {
    "nothing": b"",
    "no length": b"1234567",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": (5).to_bytes(8, "little") + b"{[1]}" + bytes(8),
    "a list": (2).to_bytes(8, "little") + b"[]" + bytes(8),
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "unknown dtype": field(dtype="F1") + bytes(8),
    "beyond the end": field(data_offsets=[4, 12]) + bytes(8),
    "negative": field(data_offsets=[-8, 0]) + bytes(8),
    "other size": field(shape=[3]) + bytes(8),
    "negative shape": field(shape=[-1, -2]) + bytes(8),
    "overflowing shape": field(shape=[2**40, 2**40, 0, 1.0]) + bytes(8),
    "truth as number": field(shape=[True, 2]) + bytes(8),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_headers_are_not_believed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad is damaged: its header (claims|does not fit)") as error:
        read_header(LocalFolder(tmp_path), "bad", size=len(content))
    assert "\n" not in str(error.value)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_end_in_an_error_or_in_entries_inside_the_file(content: bytes, length: int) -> None:
    class Bytes(LocalFolder):
        def read_into(self, name: str, start: int, buffer: memoryview) -> None:
            buffer[:] = whole[start : start + len(buffer)]

    whole = length.to_bytes(8, "little") + content
    try:
        entries = read_header(Bytes(Path("x")), "y", size=len(whole))
    except ValueError:
        return
    assert all(8 <= e.start <= e.stop <= len(whole) for e in entries.values())
