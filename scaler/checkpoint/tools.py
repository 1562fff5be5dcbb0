"""What `scaler checkpoint` does: describe a checkpoint, and write it again as one plain file or somewhere else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from scaler.checkpoint.container import DTYPES, Written, lay_out, write_stream
from scaler.checkpoint.loading import Reader, read_ahead
from scaler.checkpoint.manifest import MANIFEST, in_threads, resolve_checkpoint, verify, write_manifest
from shards.places import Folder, Location, folder_at, locate

Part = Literal["method", "student", "teacher", "all"]

_PREFIX: dict[str, str] = {"method": "method/", "student": "method/student.", "teacher": "method/teacher.", "all": ""}


def describe(where: str | Location) -> dict[str, Any]:
    """Step, images, who saved it and how large each part is, of a checkpoint or a run's newest one.

    Raises:
        ValueError: no checkpoint, or no readable manifest.
    """
    location = resolve_checkpoint(where)
    manifest = Reader(location).manifest
    tensors = {
        name: {"dtype": e["dtype"], "shape": e["shape"], "bytes": _num_bytes(e), "ranges": len(e["ranges"])}
        for name, e in manifest["tensors"].items()
    }
    parts = dict.fromkeys(("method", "teacher", "optimizer"), 0)
    for name, entry in tensors.items():
        parts["teacher" if name.startswith(_PREFIX["teacher"]) else name.partition("/")[0]] += entry["bytes"]
    return {
        "checkpoint": str(location),
        "step": manifest["step"],
        "images": manifest.get("images"),
        "saved_by": manifest.get("saved_by", {}),
        "bytes": parts,
        "files": len(manifest["files"]),
        "tensors": tensors,
    }


def convert(
    source: str | Location,
    destination: str | Location,
    *,
    part: Part = "method",
    prefix: str = "",
    num_files: int | None = None,
) -> dict[str, Any]:
    """Verify a checkpoint and write it again, a few megabytes at a time.

    Args:
        source: a checkpoint, or a run (its newest).
        destination: ending in `.safetensors`, one file of whole tensors for other programs; else a path or URL that
            becomes the same checkpoint.
        part: for one file: the method's weights by the names of its state_dict (all, the student's or the teacher's
            alone), or everything by the names of the manifest.
        prefix: for one file: only what begins with this, without it.
        num_files: for a checkpoint: how many files it gets; as many as the source if None.

    Returns:
        `destination`, `bytes` and `tensors`.

    Raises:
        ValueError: a damaged source, a destination that is a checkpoint already, or nothing to write.
    """
    reader, target = Reader(resolve_checkpoint(source)), locate(destination)
    plain = target.name.endswith(".safetensors")
    if plain and num_files is not None:
        raise ValueError(f"{target} is one file, not {num_files}; leave out the number, or name a folder")
    if not plain and (part != "method" or prefix):
        raise ValueError(
            f"{target} becomes a whole checkpoint; a part or a prefix is for a destination that ends in .safetensors"
        )
    verify(reader.location)
    if plain:
        return {"destination": str(target), **_write_plain(reader, target, keep=_PREFIX[part], strip=prefix)}
    return {"destination": str(target), **_write_checkpoint(reader, folder_at(target), num_files=num_files)}


def _write_plain(reader: Reader, target: Location, *, keep: str, strip: str) -> dict[str, Any]:
    manifest = reader.manifest
    whole = len(_PREFIX["method"]) if keep else 0
    names = {name[whole:]: name for name in manifest["tensors"] if name.startswith(keep)}
    names = {key[len(strip) :]: name for key, name in names.items() if key.startswith(strip) and key != strip}
    if not names:
        known = sorted({name.partition("/")[2].partition(".")[0] for name in manifest["tensors"] if "method/" in name})
        raise ValueError(
            f"{reader.location} has no weights of this part and prefix; its method consists of {', '.join(known)}"
        )
    entries = {key: manifest["tensors"][name] for key, name in names.items()}
    facts = {"format": "pt", "step": str(manifest["step"]), "images": str(manifest.get("images"))}
    header, order = lay_out({key: (DTYPES[e["dtype"]], e["shape"]) for key, e in entries.items()}, metadata=facts)
    wanted = [(names[key], 0, math.prod(entry.shape)) for key, entry in order.items()]
    with folder_at(target.parent).writing(target.name) as write:
        written = _write_tensors(write, header, reader, wanted)
    return {"bytes": written.size, "tensors": len(names)}


def _write_checkpoint(reader: Reader, folder: Folder, *, num_files: int | None) -> dict[str, Any]:
    """Cut the tensors, one behind the other, into files of about equal size."""
    if folder.exists(MANIFEST):
        raise ValueError(f"{folder.location} is a checkpoint already; remove it, or name another place")
    manifest, count = reader.manifest, num_files or len(reader.manifest["files"])
    names = [f"part-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    ranges: dict[str, list[list[Any]]] = {name: [] for name in manifest["tensors"]}
    shares: dict[str, list[tuple[str, int, int]]] = {name: [] for name in names}
    share = max(1, -(-sum(_num_bytes(e) for e in manifest["tensors"].values()) // count))
    at = 0  # byte of all tensors, one behind the other
    for name, entry in manifest["tensors"].items():
        width, start, stop = DTYPES[entry["dtype"]].itemsize, 0, math.prod(entry["shape"])
        while start < stop:
            number = min(count - 1, at // share)
            room = share * (number + 1) - at if number < count - 1 else stop * width
            end = min(stop, start - (-room // width))  # rounded up: a file holds a tensor once
            ranges[name].append([start, end, names[number]])
            shares[names[number]].append((name, start, end))
            at, start = at + (end - start) * width, end

    def write_file(name: str) -> Written:
        lengths = {key: (DTYPES[manifest["tensors"][key]["dtype"]], (b - a,)) for key, a, b in shares[name]}
        header, order = lay_out(lengths)
        bounds = {key: (a, b) for key, a, b in shares[name]}
        with folder.writing(name) as write:
            return _write_tensors(write, header, reader, [(key, *bounds[key]) for key in order])

    written = dict(zip(names, in_threads(folder, write_file, names), strict=True))
    tensors = {name: {**entry, "ranges": ranges[name]} for name, entry in manifest["tensors"].items()}
    files = {name: w.entry() for name, w in written.items()}
    write_manifest(folder, {**manifest, "files": files, "tensors": tensors})
    return {"bytes": sum(w.size for w in written.values()), "tensors": len(tensors)}


def _write_tensors(write: Any, header: bytes, reader: Reader, wanted: Sequence[tuple[str, int, int]]) -> Written:
    def parts() -> Iterator[Any]:
        yield header
        spans = (span for name, start, stop in wanted for span in reader.spans(name, start, stop))
        reads = (partial(reader.read, span) for span in spans)
        with contextlib.closing(read_ahead(reads, threads=reader.folder.threads)) as results:
            for values in results:
                yield values.numpy().data

    return write_stream(write, parts())


def _num_bytes(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
