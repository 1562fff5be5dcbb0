"""The safetensors format by hand: written as a stream, hashed on the way, and read by range.

    8 bytes   length of the header, little-endian
    header    JSON: name → dtype, shape, data_offsets [start, stop] behind the header
    data      the tensors, without gaps

The safetensors package reads these files (the tests do). It is not used here because it wants whole tensors in memory
to write, and a local file to read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shards.places import Folder, Write

CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}  # by the names that manifests use
_BY_CODE = {code: dtype for dtype, code in CODES.items()}
_MAX_HEADER = 100_000_000  # bytes; as the safetensors package
_FIRST_READ = 1 << 16  # bytes; holds most headers
_WRITE = 1 << 26  # bytes hashed and written at a time: every turn asks for the interpreter's lock, and so waits
_READ = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """What was written: its bytes and their sha256."""

    size: int
    sha256: str

    def entry(self) -> dict[str, Any]:
        """As manifests keep it."""
        return {"bytes": self.size, "sha256": self.sha256}


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file of these tensors (with the eight bytes before it), and where each lies, in the file's order.

    Wide elements come first, so that every tensor is aligned.

    Raises:
        ValueError: a dtype that is not written.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in CODES:
            raise ValueError(f"{name} is {dtype}; checkpoints hold {', '.join(DTYPES)}")
    at, places = 0, {}
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        size = math.prod(shape) * dtype.itemsize
        places[name] = Entry(dtype, tuple(shape), at, at + size)
        at += size
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, e in places.items():
        fields[name] = {"dtype": CODES[e.dtype], "shape": e.shape, "data_offsets": [e.start, e.stop]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    shifted = {name: Entry(e.dtype, e.shape, e.start + len(header), e.stop + len(header)) for name, e in places.items()}
    return header, shifted


def write_stream(write: Write, parts: Iterable[Any]) -> Written:
    """Write byte buffers one after the other and hash them in the same pass."""
    digest, size = hashlib.sha256(), 0
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), _WRITE):
            chunk = view[at : at + _WRITE]
            digest.update(chunk)
            write(chunk)
        size += len(view)
    return Written(size, digest.hexdigest())


def read_header(folder: Folder, name: str, *, size: int) -> dict[str, Entry]:
    """The tensors in a file of `size` bytes; nothing in the header is believed before it fits into them.

    Raises:
        ValueError: the header is damaged; names the file.
    """
    first = bytearray(min(size, _FIRST_READ))
    folder.read_into(name, 0, memoryview(first))
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"{folder.location / name} is damaged: its header claims {length} bytes of {size}")
    rest = bytearray(max(0, 8 + length - len(first)))
    folder.read_into(name, len(first), memoryview(rest))
    try:
        fields = json.loads((first + rest)[8 : 8 + length])
        fields.pop("__metadata__", None)
        return {key: _entry(field, base=8 + length, size=size) for key, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder.location / name} is damaged: its header does not fit it ({reason})") from None


def _entry(field: Any, *, base: int, size: int) -> Entry:
    dtype, shape, (start, stop) = _BY_CODE[field["dtype"]], field["shape"], field["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape} at {start}:{stop}")
    if stop - start != math.prod(shape) * dtype.itemsize or base + stop > size:
        raise ValueError(f"shape {shape} at {start}:{stop} of {size - base} bytes")
    return Entry(dtype, tuple(shape), base + start, base + stop)


def sha256_of(folder: Folder, name: str, *, size: int) -> str:
    """The sha256 of the first `size` bytes of a file.

    Raises:
        ValueError: the file ends before.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, _READ)))
    for start in range(0, size, len(buffer) or 1):
        part = buffer[: size - start]
        folder.read_into(name, start, part)
        digest.update(part)
    return digest.hexdigest()
