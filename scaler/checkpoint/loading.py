"""Reading checkpoints: every rank takes the byte ranges that it needs, and nothing else.

Shapes and ranges come from the manifest, whose sha256 has been checked; the header of a file only says where in it a
tensor lies, and is checked against both.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaler.checkpoint.container import DTYPES, Entry, read_header
from scaler.checkpoint.manifest import in_threads, read_manifest, resolve_checkpoint, verify
from scaler.strategies.base import Piece
from shards.places import Location, folder_at, locate

RUN = 1 << 23  # most bytes that are read at once
_GAP = 1 << 18  # bytes that are rather read for nothing than asked around


@dataclass(frozen=True)
class Span:
    """A stretch of one file that holds elements of one tensor: `size` bytes from byte `offset` on."""

    file: str
    offset: int
    size: int


class Reader:
    """An opened checkpoint: its manifest, and where in its files every element lies.

    Raises:
        ValueError: no readable manifest.
    """

    def __init__(self, where: str | Location) -> None:
        self.location = locate(where)
        self.folder = folder_at(self.location)
        self.manifest = read_manifest(self.location)
        self._headers: dict[str, dict[str, Entry]] = {}

    def spans(self, name: str, start: int, stop: int) -> Iterator[Span]:
        """Where elements [start, stop) of a tensor lie, in order, in spans of at most `RUN` bytes.

        Raises:
            ValueError: a file does not hold what the manifest says.
        """
        entry = self.manifest["tensors"][name]
        width = DTYPES[entry["dtype"]].itemsize
        for a, b, file in entry["ranges"]:
            low, high = max(a, start), min(b, stop)
            if low < high:
                held = self._header(file).get(name)
                if held is None or held.dtype != DTYPES[entry["dtype"]] or held.shape != (b - a,):
                    raise ValueError(f"{self.location / file} does not hold {name} as its manifest says")
                first, last = held.start + (low - a) * width, held.start + (high - a) * width
                for at in range(first, last, RUN):
                    yield Span(file, at, min(RUN, last - at))

    def open_headers(self, files: Iterable[str]) -> None:
        """Read the headers of several files at a time, instead of one when it is needed."""
        missing = sorted(set(files) - self._headers.keys())
        self._headers |= dict(zip(missing, in_threads(self.folder, self._read_header, missing), strict=True))

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        return self._headers[file]

    def _read_header(self, file: str) -> dict[str, Entry]:
        return read_header(self.folder, file, size=self.manifest["files"][file]["bytes"])

    def read(self, span: Span) -> Tensor:
        """The bytes of a span, as uint8."""
        buffer = torch.empty(span.size, dtype=torch.uint8)
        self.folder.read_into(span.file, span.offset, buffer.numpy().data)
        return buffer


def load_pieces(where: str | Location, pieces: dict[str, Piece]) -> None:
    """Fill `pieces` in place with a checkpoint's values; reads only the ranges that they cover.

    Raises:
        ValueError: other names or shapes than the checkpoint's: another architecture, method or optimiser.
    """
    reader = Reader(where)
    tensors = reader.manifest["tensors"]
    _check_names(reader.location, pieces, tensors)
    needed = {
        file
        for name, piece in pieces.items()
        for a, b, file in tensors[name]["ranges"]
        if a < piece.start + piece.data.numel() and piece.start < b
    }
    reader.open_headers(needed)
    wanted = defaultdict(list)  # file → [(span, where its values go)]
    for name, piece in pieces.items():
        at, dtype = 0, DTYPES[tensors[name]["dtype"]]
        for span in reader.spans(name, piece.start, piece.start + piece.data.numel()):
            count = span.size // dtype.itemsize
            wanted[span.file].append((span, dtype, piece.data[at : at + count]))
            at += count

    @torch.no_grad()  # which is a thread's own affair
    def fill(run: list[tuple[Span, torch.dtype, Tensor]]) -> None:
        first, last = run[0][0], run[-1][0]
        values = reader.read(Span(first.file, first.offset, last.offset + last.size - first.offset))
        for span, dtype, target in run:
            part = values[span.offset - first.offset :][: span.size]
            aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
            target.copy_(aligned.view(dtype))

    in_threads(reader.folder, fill, [run for spans in wanted.values() for run in _runs(spans)])


def _runs(spans: list[tuple[Span, torch.dtype, Tensor]]) -> Iterator[list[tuple[Span, torch.dtype, Tensor]]]:
    """Neighbours in a file that are read at once."""
    run: list[tuple[Span, torch.dtype, Tensor]] = []
    for item in sorted(spans, key=lambda item: item[0].offset):
        span = item[0]
        if run:
            first, last = run[0][0], run[-1][0]
            near = span.offset - (last.offset + last.size) <= _GAP
            if not near or span.offset + span.size - first.offset > RUN:
                yield run
                run = []
        run.append(item)
    if run:
        yield run


def read_ahead(reads: Iterable[Callable[[], Tensor]], *, threads: int) -> Generator[Tensor]:
    """The results of `reads` in their order, with a few of them under way."""
    pending: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for read in reads:
            pending.append(pool.submit(read))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def load_method(where: str | Location, method: nn.Module) -> dict[str, Any]:
    """Load the method's weights (teacher and buffers included) from a checkpoint or run; returns the manifest.

    Raises:
        ValueError: damaged files, or another architecture.
    """
    location = resolve_checkpoint(where)
    verify(location)
    manifest = read_manifest(location)
    pieces = {
        f"method/{name}": Piece(tensor.detach().view(-1), 0, tuple(tensor.shape), copy=0, copies=1)
        for name, tensor in method.state_dict().items()
    }
    saved = {name for name in manifest["tensors"] if name.startswith("method/")}
    for name in saved - pieces.keys():
        raise ValueError(f"{location}: holds {name}, which this model lacks: it is of another architecture")
    load_pieces(location, pieces)
    return manifest


def _check_names(location: Location, pieces: dict[str, Piece], tensors: dict[str, Any]) -> None:
    wanted = {name: tuple(piece.shape) for name, piece in pieces.items()}
    whole = any(name.startswith("optimizer/") for name in wanted)
    saved = {n: tuple(e["shape"]) for n, e in tensors.items() if whole or n.startswith("method/")}
    for what, names in (("lacks", wanted.keys() - saved.keys()), ("has", saved.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"{location} {what} {min(names)} (and {len(names) - 1} more) compared with this recipe's "
                "model: it is of another architecture, method or optimiser"
            )
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise ValueError(
                f"{location}: {name} has shape {saved[name]} and this recipe's model {shape}: "
                "it is of another architecture"
            )
