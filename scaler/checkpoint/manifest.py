"""What a checkpoint says of itself, where checkpoints are found, and whether one is whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from scaler.checkpoint.container import DTYPES, read_header, sha256_of
from scaler.collectives import World
from shards.places import Folder, Location, folder_at, locate

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-\d{8,}")


def complete_checkpoints(folder: str | Location) -> list[Location]:
    """Complete checkpoints inside a `checkpoints/` folder (or URL), newest first."""
    return [locate(folder) / name for name, files in _steps(locate(folder)).items() if MANIFEST in files]


def incomplete_checkpoints(folder: str | Location) -> list[Location]:
    """What was begun in such a folder and has no manifest."""
    return [locate(folder) / name for name, files in _steps(locate(folder)).items() if MANIFEST not in files]


def _steps(folder: Location) -> dict[str, set[str]]:
    """The `step-…` folders by descending step, and the files in each."""
    found: dict[str, set[str]] = {}
    if isinstance(folder, Path):
        found = {path.name: set(folder_at(path).sizes()) for path in folder.glob("step-*") if path.is_dir()}
    else:
        for path in folder_at(folder).sizes():
            step, _, name = path.partition("/")
            found.setdefault(step, set()).add(name)
    steps = [step for step in found if _STEP.fullmatch(step)]
    return {step: found[step] for step in sorted(steps, key=step_of, reverse=True)}


def step_of(name: str) -> int:
    """The step of a checkpoint folder's name."""
    return int(name.removeprefix("step-"))


def run_checkpoints(run_dir: Location) -> list[Location]:
    """Complete checkpoints of a run, newest first: in its `checkpoint.dir` if its recipe has one, else inside it."""
    folder = None
    if isinstance(run_dir, Path) and (run_dir / "recipe.yaml").is_file():
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        folder = recipe.get("checkpoint", {}).get("dir")
    return complete_checkpoints(folder or run_dir / "checkpoints")


def resolve_checkpoint(where: str | Location) -> Location:
    """A checkpoint from its own path or URL, that of a folder of checkpoints, or a run directory (its newest).

    Raises:
        ValueError: none of these.
    """
    location = locate(where)
    if folder_at(location).exists(MANIFEST):
        return location
    found = complete_checkpoints(location) or run_checkpoints(location)
    if not found:
        raise ValueError(f"{location} is no checkpoint (no manifest.json) and no run directory with a complete one")
    return found[0]


def read_manifest(where: str | Location) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: missing, damaged, of another format, or its ranges have holes or overlaps.
    """
    location = locate(where)
    try:
        manifest: dict[str, Any] = json.loads(folder_at(location).read(MANIFEST))
        if manifest["format"] != FORMAT:
            raise ValueError(f"{location}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError(f"{location}: manifest.json is damaged (its sha256 does not match)")
        for name in manifest["files"]:
            if "/" in name or name.startswith("."):
                raise ValueError(f"{location}: manifest.json names {name!r}, which is no file of a checkpoint")
        for name, entry in manifest["tensors"].items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{location}: {name} has the unknown dtype {entry['dtype']!r}")
            at = 0
            for start, stop, file in entry["ranges"]:
                if start != at or stop <= start or file not in manifest["files"]:
                    raise ValueError(f"{location}: {name} has a hole or overlap at element {at}")
                at = stop
            if at != math.prod(entry["shape"]):
                raise ValueError(f"{location}: {name} ends at element {at} of {math.prod(entry['shape'])}")
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{location}: no readable manifest.json ({type(error).__name__}: {error})") from None
    return manifest


def write_manifest(folder: Folder, manifest: dict[str, Any]) -> None:
    """Make a checkpoint whose files are all there complete: the last thing that is written."""
    folder.write(MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}).encode())


def verify(where: str | Location) -> None:
    """Check sizes and sha256 of all files of a checkpoint.

    Raises:
        ValueError: names the damaged file.
        OSError: a place that cannot be read.
    """
    for problem in problems(where):
        raise ValueError(problem)


def problems(where: str | Location, *, world: World | None = None) -> list[str]:
    """What is wrong with a checkpoint, one line a file; with a world, with this rank's share of its files.

    Raises:
        OSError: the place cannot be read, which says nothing about the checkpoint.
    """
    world, folder = world or World(), folder_at(locate(where))
    try:
        manifest = read_manifest(where)
    except ValueError as error:
        return [str(error)]
    sizes, lengths = folder.sizes(), _lengths(manifest)

    def check(name: str) -> str | None:
        entry, path = manifest["files"][name], folder.location / name
        if name not in sizes:
            return f"{path} is missing"
        if sizes[name] != entry["bytes"]:
            return f"{path} has {sizes[name]} bytes instead of {entry['bytes']}"
        try:
            if sha256_of(folder, name, size=entry["bytes"]) != entry["sha256"]:
                return f"{path} has another sha256 than its manifest says"
            header = read_header(folder, name, size=entry["bytes"])
        except FileNotFoundError:
            return f"{path} is missing"
        except ValueError as error:
            return str(error)
        held = {key: (e.dtype, e.shape) for key, e in header.items()}
        for key, wanted in lengths.get(name, {}).items():
            if held.get(key) != wanted:
                return f"{path} does not hold {key} as its manifest says"
        return None

    return [line for line in in_threads(folder, check, sorted(manifest["files"])[world.rank :: world.size]) if line]


def _lengths(manifest: dict[str, Any]) -> dict[str, dict[str, tuple[Any, tuple[int, ...]]]]:
    """What each file must hold: by tensor, dtype and shape."""
    found: dict[str, dict[str, tuple[Any, tuple[int, ...]]]] = {}
    for key, entry in manifest["tensors"].items():
        for start, stop, file in entry["ranges"]:
            found.setdefault(file, {})[key] = DTYPES[entry["dtype"]], (stop - start,)
    return found


def in_threads(folder: Folder, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of every item, several at a time where the folder bears it."""
    with ThreadPoolExecutor(folder.threads) as pool:
        return list(pool.map(function, items))


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
