"""Shards: whether all of them are there and can be read, and how fast samples come from them on one core."""

from __future__ import annotations

import contextlib
import os
import pwd
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaler.doctor.finding import Finding, counted, first_line
from shards.places import without_secrets

_READ_SECONDS, _DECODE_SECONDS = 1.0, 1.5
_CHUNK = 4 << 20  # bytes read at a time
_SAMPLES = 2000  # at most, spread evenly
_SHARDS = 20_000  # whose sizes are compared with the index


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """Index, shards, rate of the disk (past the page cache) or network, decoding.

    Args:
        asked: `shards`, a folder or URL; `views`, what is cut from each picture; `cache_dir` of remote shards;
            `decode`, where pictures are decoded (cpu or gpu); `cores`, which `processes` that train share with their
            decoding; `fed`, what `scaler bench feed` found of the recipe's step, if anybody has asked it; `elsewhere`:
            other machines read these shards, and this one need not.
    """
    from scaler.recipe import Data
    from shards.index import ShardIndex
    from shards.indexing import sorted_by_class

    place = asked["shards"]
    os.environ.setdefault("SCALER_REMOTE_SECONDS", "5")  # a training has more patience with a store
    if asked["elsewhere"] and "://" not in place and not os.path.exists(place):
        yield Finding("ok", "shards", f"{place} is not on this machine: how fast it is was not measured")
        return
    cache = Data(shards=place, cache_dir=asked["cache_dir"], global_batch_size=1, image_size=1).cache()
    try:
        index = ShardIndex.load(place, cache=cache)
    except ValueError as error:
        yield _no_index(place, error)
        return
    here = isinstance(index.shards_at, Path)
    if here and (finding := _missing(index)):
        yield finding
        return
    facts = {"samples": index.num_samples, "shards": len(index.shard_names), "bytes": index.num_bytes}
    found = (
        f"{without_secrets(place)}: {counted(index.num_samples, 'image')} in {counted(facts['shards'], 'shard')}"
        + ", all there" * here
    )
    if advice := sorted_by_class(index):
        yield Finding("warning", "shards", f"{found}; {advice}", facts=facts)
    else:
        yield Finding("ok", "shards", found, facts=facts)
    if here:
        yield _read_rate(index)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):  # which `scaler.doctor.installation` tells
        yield Finding("ok", "decoding", "not measured, since torch cannot be imported")
    else:
        if asked["decode"] == "gpu":
            yield _gpu_decoding()
        yield _decode_rate(
            index,
            views=asked["views"],
            cores=asked["cores"],
            processes=asked["processes"],
            fed=asked["fed"] if asked["decode"] == "cpu" else None,
        )


def _no_index(place: str, error: ValueError) -> Finding:
    """Why there is no index to read: the folder is not there, holds none, or may not be read by this user."""
    folder = Path(place)
    if "://" in place:
        shown, (found, _, advice) = without_secrets(place), first_line(error).partition(": ")
        if advice.startswith("make shards"):
            return Finding("error", "shards", found, advice)
        fix = f"curl -I {shown}/index.json says whether it can be reached from here"
        return Finding("error", "shards", f"{found}: {advice}", fix)
    if isinstance(error.__cause__, PermissionError):
        found = f"{pwd.getpwuid(os.geteuid()).pw_name} may not read {place} ({_mode(folder)})"
        return Finding("error", "shards", found, f"chmod -R a+rX {place}, as who owns it")
    if not folder.is_dir():
        return Finding("error", "shards", f"{place} is no folder", f"scaler convert IMAGES {place}")
    if isinstance(error.__cause__, FileNotFoundError):
        shards = len(list(folder.glob("*.tar")))
        fix = f"scaler index {place}" if shards else f"scaler convert IMAGES {place}"
        return Finding("error", "shards", f"{place} holds no index.json, and {counted(shards, 'shard')}", fix)
    return Finding("error", "shards", first_line(error), f"scaler index {place}")


def _mode(folder: Path) -> str:
    """Of the first folder on the way to `folder` that stops us: its owner and rights."""
    for place in [*reversed(folder.absolute().parents), folder.absolute()]:
        found = place.stat()
        if not os.access(place, os.X_OK | os.R_OK if place == folder.absolute() else os.X_OK):
            with contextlib.suppress(KeyError):
                return f"{place} belongs to {pwd.getpwuid(found.st_uid).pw_name}, mode {found.st_mode & 0o7777:o}"
            return f"{place} belongs to user {found.st_uid}, mode {found.st_mode & 0o7777:o}"
    return "its files may not be read"


def _missing(index: Any) -> Finding | None:
    """Shards that are missing, of another size, or may not be read."""
    problems = []
    for number in _spread(len(index.shard_names), _SHARDS):
        path = index.shard_path(number)
        try:
            index.check_shard(number, full=False)
        except ValueError as error:
            problems.append(first_line(error))
        else:
            if not os.access(path, os.R_OK):
                problems.append(f"cannot read shard {path}: Permission denied; chmod a+r {index.path}/*")
    if not problems:
        return None
    found, _, fix = problems[0].partition("; ")
    more = f"; and so {len(problems) - 1} others" * (len(problems) > 1)
    return Finding("error", "shards", found + more, fix or f"scaler verify {index.path} tells all")


def _read_rate(index: Any) -> Finding:
    """Bytes a second from the shards' disk, read in large pieces spread over them, past the page cache."""
    seconds, read = 0.0, 0
    for number in _spread(len(index.shard_names), 256):
        with open(index.shard_path(number), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            for _ in range(64):
                piece = file.read(_CHUNK)
                read += len(piece)
                if not piece or (seconds + time.perf_counter() - started) > _READ_SECONDS:
                    break
            seconds += time.perf_counter() - started
        if seconds > _READ_SECONDS:
            break
    rate, mean = read / seconds, index.num_bytes / max(1, index.num_samples)
    facts = {"bytes_per_second": rate, "images_per_second": rate / mean}
    found = f"{rate / 1e6:.0f} MB/s from the disk, which is {rate / mean:.0f} images/s of {mean / 1e3:.0f} KB"
    return Finding("ok", "reading", found, facts=facts)


def _gpu_decoding() -> Finding:
    """Whether the GPU here decodes JPEGs; it is tried."""
    import torch

    from shards.device_decode import why_no_gpu_decoding

    why = why_no_gpu_decoding(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if why is None:
        return Finding("ok", "decoding", "the GPU decodes JPEGs (data.decode=gpu); the workers do the rest")
    return Finding("error", "decoding", f"data.decode=gpu, but {why}", "data.decode=cpu")


def _decode_rate(
    index: Any, *, views: Sequence[dict[str, Any]], cores: int, processes: int, fed: dict[str, Any] | None
) -> Finding:
    """Images per second of processor time through what a loader process does: read, prove, decode, cut; and whether
    there are cores enough for what the step wants, where that is known."""
    import torch

    from scaler.supply import delivered, worker_room, workers_needed
    from shards.decode import DecodeError, View, decode_views
    from shards.reader import SampleReader
    from shards.resize import cut, cut_with_kernel

    torch.set_num_threads(1)
    cuts = [View(**view) for view in views] or [View("view", 224, count=2)]
    done, bad, first = 0, 0, ""
    with contextlib.closing(SampleReader(index)) as reader:
        deadline, started = time.monotonic() + 4 * _DECODE_SECONDS, time.process_time()
        for number in _spread(index.num_samples, _SAMPLES):
            sample = index.entry(number)
            try:
                data = reader.read(sample)
                if zlib.crc32(data) != sample.crc32:
                    raise ValueError(f"shard {index.shard_path(sample.shard)} is damaged at {sample.key!r}")
                decode_views(data, views=cuts, seed=0, epoch=0, sample_id=number)
            except DecodeError as error:
                bad, first = bad + 1, first or f"{sample.key}: {error}"
            except ValueError as error:
                return Finding("error", "reading", first_line(error), f"scaler verify {index.path} tells all")
            done += 1
            if time.process_time() - started > _DECODE_SECONDS or time.monotonic() > deadline:
                break
        rate = done / (time.process_time() - started)
    facts = {"images_per_cpu_second": rate, "undecodable": bad, "looked_at": done}
    cut_to = ", ".join(f"{view.count} of {view.size} px" for view in cuts)
    room = worker_room(cores, processes=processes)
    most = processes * delivered(room, {1: rate})
    found = (
        f"{rate:.0f} images per CPU-second, each cut to {cut_to}: {counted(processes * room, 'worker')} on "
        f"{counted(cores, 'core')} deliver{'s' * (processes * room == 1)} {most:.0f}/s"
    )
    lacking = ""
    if fed is not None:
        needed = workers_needed(fed["wanted"], {1: rate})
        found += (
            f"; the step wants {fed['wanted']:.0f}/s of each process: {counted(needed, 'worker')}, "
            f"{counted(needed + 1, 'core')}"
        )
        facts |= {"workers_needed": needed}
        if needed > room:
            lacking = "store smaller images (scaler convert --resize 256)"
            if fed["gpu_decoding_pays"]:
                lacking = f"set data.decode=gpu, which pays by scaler bench feed, or {lacking}"
    if bad:
        found += f"; {bad} of {done} cannot be decoded, as {first}"
        return Finding("warning", "decoding", found, f"scaler verify {index.path} --decode lists them", facts=facts)
    if cut is not cut_with_kernel:
        fix = "apt-get install g++ python3-dev, then pip install --force-reinstall --no-deps scaler"
        return Finding("warning", "decoding", f"{found}, without the compiled kernel", fix, facts=facts)
    if lacking:
        return Finding("warning", "decoding", found, lacking, facts=facts)
    return Finding("ok", "decoding", found, facts=facts)


def _spread(available: int, wanted: int) -> list[int]:
    """`wanted` of so many numbers, or all, spread evenly."""
    count = min(available, wanted)
    return [i * available // count for i in range(count)]
