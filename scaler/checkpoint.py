"""Checkpoints: one format whatever the strategy, written by all ranks in the background, verified when read.

    RUN/checkpoints/step-00000100/
        rank-00000.safetensors      the flat ranges that rank 0 had
        rank-00000.json             what is in it, its size and sha256
        manifest.json               every tensor's shape, dtype and ranges, recipe, data fingerprint, images seen

Every strategy's piece of a tensor is a contiguous range of the flattened tensor, so nothing is gathered to save, and a
reader on any other layout takes just the ranges it needs. A checkpoint is complete when its manifest exists, which is
written last; every file is written under another name, synced and renamed. Nothing is unpickled on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scaler.collectives import World
from scaler.strategies.base import Piece

FORMAT = 1
_WAIT_FOR_RANKS = 1800.0  # seconds rank 0 waits for the files of the others


class Checkpointer:
    """Saves and finds the checkpoints of one run directory.

    Args:
        run_dir: holds `checkpoints/`; shared by all ranks.
        world: the ranks that save together.
        keep_last: how many complete checkpoints to keep.
        keep_every: steps whose multiples are kept for good; 0: none.
    """

    def __init__(self, run_dir: Path, *, world: World, keep_last: int, keep_every: int = 0) -> None:
        self.folder = run_dir / "checkpoints"
        self.world, self.keep_last, self.keep_every = world, keep_last, keep_every
        self._session = world.broadcast_object(uuid.uuid4().hex)  # tells our files from those of a dead attempt
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("step-*"):
                if not (path / "manifest.json").exists():
                    shutil.rmtree(path)
        world.barrier()

    def save(self, *, step: int, pieces: dict[str, Piece], info: dict[str, Any]) -> None:
        """Copy this rank's pieces to host memory and write them in the background.

        Replicated tensors are split among the ranks. `info` is put into the manifest (recipe, fingerprint, state).

        Raises:
            ValueError: the checkpoint before this one could not be written.
        """
        self.wait()
        copies, ranges = {}, {}
        for name, piece in pieces.items():
            part, start = _share(piece)
            if part.numel():
                copies[name] = part.to("cpu", copy=True)
                ranges[name] = [start, start + part.numel()]
        shapes = {name: {"shape": list(p.shape), "dtype": str(p.data.dtype)[6:]} for name, p in pieces.items()}
        manifest = {"format": FORMAT, "step": step, **info, "tensors": shapes}
        path = self.folder / f"step-{step:08d}"
        self._thread = threading.Thread(target=self._write, args=(path, copies, ranges, manifest), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way, if any, is complete on the disk (for rank 0: manifest included).

        Raises:
            ValueError: it failed; says why and what the run can be resumed from.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a background save, if there was one.

        Raises:
            ValueError: as `wait`.
        """
        if self._error is not None:
            error, self._error = self._error, None
            left = complete_checkpoints(self.folder)
            last = f"the run resumes from {left[0].name}" if left else "there is no complete checkpoint yet"
            raise ValueError(
                f"could not save a checkpoint in {self.folder}: {error}; make room or repair it, then "
                f"start again: {last}"
            ) from error

    def find(self) -> Path | None:
        """The newest checkpoint of this run that is whole, on every rank; the ranks share the work of hashing.

        Damaged ones are named and passed over.

        Raises:
            ValueError: there are checkpoints and all of them are damaged.
        """
        candidates = self.world.broadcast_object([str(p) for p in complete_checkpoints(self.folder)])
        for candidate in candidates:
            problems = [p for p in self.world.gather_objects(_problem(Path(candidate), world=self.world)) if p]
            if not problems:
                return Path(candidate)
            if self.world.rank == 0:
                print(f"warning: checkpoint {candidate} is damaged ({problems[0]}); trying the one before it")
        if candidates:
            raise ValueError(f"every checkpoint in {self.folder} is damaged; restore one, or start in a new run.dir")
        return None

    # ------------------------------------------------------------------ the background thread

    def _write(self, path: Path, copies: dict[str, Tensor], ranges: dict[str, Any], manifest: dict[str, Any]) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stem = f"rank-{self.world.rank:05d}"
            data = path / f"{stem}.safetensors"
            temporary = path / f".{stem}.tmp"
            try:
                save_file(copies, temporary)
                size, digest = temporary.stat().st_size, _sha256(temporary)
                _commit(temporary, data)
            finally:
                temporary.unlink(missing_ok=True)
            part = {"session": self._session, "file": data.name, "bytes": size, "sha256": digest, "ranges": ranges}
            _write_json(path / f"{stem}.json", part)
            if self.world.rank == 0:
                _write_json(path / "manifest.json", self._complete(path, manifest))
                self._prune()
        except (OSError, SafetensorError, TimeoutError) as error:
            self._error = error

    def _complete(self, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """The manifest with the ranges of all ranks, once their files are there."""
        files: dict[str, Any] = {}
        ranges: dict[str, list[list[Any]]] = {name: [] for name in manifest["tensors"]}
        deadline = time.monotonic() + _WAIT_FOR_RANKS
        for rank in range(self.world.size):
            part = self._wait_for(path / f"rank-{rank:05d}.json", deadline=deadline)
            files[part["file"]] = {"bytes": part["bytes"], "sha256": part["sha256"]}
            for name, (start, stop) in part["ranges"].items():
                ranges[name].append([start, stop, part["file"]])
        tensors = {name: {**entry, "ranges": sorted(ranges[name])} for name, entry in manifest["tensors"].items()}
        manifest = {**manifest, "files": files, "tensors": tensors}
        return {**manifest, "sha256": _digest(manifest)}

    def _wait_for(self, path: Path, *, deadline: float) -> dict[str, Any]:
        while time.monotonic() < deadline:
            if path.exists():
                part: dict[str, Any] = json.loads(path.read_text())
                if part["session"] == self._session:
                    return part
            time.sleep(0.02)
        raise TimeoutError(f"{path.name} of {path.parent} did not appear within {_WAIT_FOR_RANKS:.0f} s")

    def _prune(self) -> None:
        for path in complete_checkpoints(self.folder)[self.keep_last :]:
            step = int(path.name.removeprefix("step-"))
            if not self.keep_every or step % self.keep_every:
                (path / "manifest.json").unlink()  # first: half a checkpoint must not look whole
                shutil.rmtree(path)


# ---------------------------------------------------------------------- reading


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints inside a `checkpoints/` folder, newest first."""
    return sorted((p.parent for p in folder.glob("step-*/manifest.json")), reverse=True)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from its own path or a run directory's (its newest complete one).

    Raises:
        ValueError: neither.
    """
    path = Path(path)
    if (path / "manifest.json").exists():
        return path
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"{path} is no checkpoint (no manifest.json) and no run directory with a complete one")
    return found[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        ValueError: missing, unreadable, of another format, or its ranges have holes or overlaps.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError(f"{path}: manifest.json is damaged (its sha256 does not match)")
        for name, entry in manifest["tensors"].items():
            at = 0
            for start, stop, file in entry["ranges"]:
                if start != at or file not in manifest["files"]:
                    raise ValueError(f"{path}: {name} has a hole or overlap at element {at}")
                at = stop
            if at != _numel(entry["shape"]):
                raise ValueError(f"{path}: {name} ends at element {at} of {_numel(entry['shape'])}")
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable manifest.json ({type(error).__name__}: {error})") from None
    return manifest


def verify(path: Path, *, world: World | None = None) -> None:
    """Check sizes and sha256 of a checkpoint's files; with a world, of this rank's share of them.

    Raises:
        ValueError: names the damaged file.
    """
    world = world or World()
    files = sorted(read_manifest(path)["files"].items())
    for name, entry in files[world.rank :: world.size]:
        file = path / name
        if not file.exists():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} has another sha256 than its manifest says")


@torch.no_grad()
def load_pieces(path: Path, pieces: dict[str, Piece]) -> None:
    """Fill `pieces` in place with a checkpoint's values; reads only the ranges that they cover.

    Raises:
        ValueError: other names or shapes than the checkpoint's: another architecture, method or optimiser.
    """
    tensors = read_manifest(path)["tensors"]
    _check_names(path, pieces, tensors)
    with _Files(path) as files:
        for name, piece in pieces.items():
            stop = piece.start + piece.data.numel()
            for a, b, file in tensors[name]["ranges"]:
                low, high = max(a, piece.start), min(b, stop)
                if low < high:
                    values = files.read(file, name, low - a, high - a)
                    piece.data[low - piece.start : high - piece.start].copy_(values)


def load_method(path: str | Path, method: nn.Module) -> dict[str, Any]:
    """Load the method's weights (teacher and buffers included) from a checkpoint or run; returns the manifest.

    Raises:
        ValueError: damaged files, or another architecture.
    """
    folder = resolve_checkpoint(path)
    verify(folder)
    manifest = read_manifest(folder)
    pieces = {
        f"method/{name}": Piece(tensor.detach().view(-1), 0, tuple(tensor.shape), copy=0, copies=1)
        for name, tensor in method.state_dict().items()
    }
    saved = {name for name in manifest["tensors"] if name.startswith("method/")}
    for name in saved - pieces.keys():
        raise ValueError(f"{folder}: holds {name}, which this model lacks: it is of another architecture")
    load_pieces(folder, pieces)
    return manifest


class _Files:
    """Open safetensors files of one checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.clear()

    def read(self, file: str, name: str, start: int, stop: int) -> Tensor:
        if file not in self._open:
            self._open[file] = safe_open(self._path / file, framework="pt")
        return self._open[file].get_slice(name)[start:stop]


def _check_names(path: Path, pieces: dict[str, Piece], tensors: dict[str, Any]) -> None:
    wanted = {name: tuple(piece.shape) for name, piece in pieces.items()}
    whole = any(name.startswith("optimizer/") for name in wanted)
    saved = {n: tuple(e["shape"]) for n, e in tensors.items() if whole or n.startswith("method/")}
    for what, names in (("lacks", wanted.keys() - saved.keys()), ("has", saved.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"{path} {what} {min(names)} (and {len(names) - 1} more) compared with this recipe's "
                "model: it is of another architecture, method or optimiser"
            )
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise ValueError(
                f"{path}: {name} has shape {saved[name]} and this recipe's model {shape}: it is of another architecture"
            )


def _share(piece: Piece) -> tuple[Tensor, int]:
    """What this rank writes of a piece, and where that starts: its share among the ranks that hold the same."""
    chunk = -(-piece.data.numel() // piece.copies)
    first = min(piece.data.numel(), piece.copy * chunk)
    return piece.data[first : first + chunk], piece.start + first


def _problem(path: Path, *, world: World) -> str | None:
    try:
        verify(path, world=world)
    except ValueError as error:
        return str(error)
    return None


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value))
        _commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path) -> None:
    """Sync a file and its folder, renaming it in between: it appears whole or not at all, power cuts included."""
    for target in (temporary, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if target is temporary:
            temporary.replace(path)
