"""Saving: the pieces are copied to host memory within a step, and written by a thread while the training goes on.

The thread is without the interpreter's lock but for moments, and has the priority of any other: a thread of low
priority that has to wait for a core while it holds the lock would make the training wait with it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaler.checkpoint.container import Entry, lay_out, write_stream
from scaler.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    complete_checkpoints,
    incomplete_checkpoints,
    problems,
    resolve_checkpoint,
    step_of,
    write_manifest,
)
from scaler.collectives import World
from scaler.strategies.base import Piece
from shards.places import Folder, Location, folder_at, locate

_WAIT_FOR_RANKS = 1800.0  # seconds rank 0 waits for the files of the others


class Checkpointer:
    """Saves and finds the checkpoints of one run.

    Args:
        run_dir: holds `checkpoints/` unless `folder` is given; shared by all ranks.
        world: the ranks that save together.
        keep_last: how many complete checkpoints to keep.
        keep: whether the checkpoint of a step is kept for good; None: none is.
        folder: a path or URL that all ranks reach, and that no other run writes to.

    Raises:
        ValueError: the folder cannot be used; says why.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        world: World,
        keep_last: int,
        keep: Callable[[int], bool] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.folder: Location = locate(folder or run_dir / "checkpoints")
        self.world, self.keep_last, self._keep = world, keep_last, keep
        self._session = world.broadcast_object(uuid.uuid4().hex[:8])
        self._saves = 0
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._together(lambda: self._prepare() if world.rank == 0 else None)

    def save(self, *, step: int, pieces: dict[str, Piece], info: dict[str, Any], best: int | None = None) -> None:
        """Copy this rank's pieces to host memory and write them in the background.

        What several ranks hold is split among them. `info` is put into the manifest (recipe, fingerprint, state);
        the checkpoint of step `best` is kept until another one is.

        Raises:
            ValueError: the checkpoint before this one could not be written.
        """
        self.wait()
        self._saves += 1
        shapes = {name: {"shape": list(p.shape), "dtype": str(p.data.dtype)[6:]} for name, p in pieces.items()}
        manifest = {"format": FORMAT, "step": step, **info, "tensors": shapes}
        staged = self._staging.copy(pieces)
        # The name tells these files from those of a dead attempt, or of this one before it went back to redo the step.
        token = f"{self._session}-{self._saves}"
        arguments = (folder_at(self.folder / f"step-{step:08d}"), token, staged, manifest, best)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way, if any, is complete where it is stored (for rank 0: manifest included).

        Raises:
            ValueError: it failed; says why and what the run can be resumed from.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a background save, if there was one.

        Raises:
            ValueError: as `wait`.
        """
        if self._error is not None:
            error, self._error = self._error, None
            reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
            try:
                left = complete_checkpoints(self.folder)
                last = f"the run resumes from {left[0].name}" if left else "there is no complete checkpoint yet"
            except OSError:
                last = "what is there already cannot be read either"
            raise ValueError(
                f"could not save a checkpoint in {self.folder}: {reason}; make room or repair it, then "
                f"start again: {last}"
            ) from error

    # ------------------------------------------------------------------ finding

    def find(self) -> Location | None:
        """The newest checkpoint of this run that is whole, on every rank; the ranks share the work of hashing.

        Damaged ones are named and passed over.

        Raises:
            ValueError: all checkpoints are damaged, or they cannot be read now.
        """
        candidates = self._together(lambda: complete_checkpoints(self.folder) if self.world.rank == 0 else [])[0]
        for candidate in candidates:
            found = self._problems(candidate)
            if not found:
                return candidate
            if self.world.rank == 0:
                print(f"warning: checkpoint {candidate} is damaged ({found[0]}); trying the one before it")
        if candidates:
            raise ValueError(f"every checkpoint in {self.folder} is damaged; restore one, or start in a new run.dir")
        return None

    def named(self, where: str | Location) -> Location:
        """The checkpoint that a path or URL means (see `resolve_checkpoint`), checked by all ranks together.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        location = self._together(lambda: resolve_checkpoint(where))[0]
        for problem in self._problems(location):
            raise ValueError(problem)
        return location

    def _problems(self, location: Location) -> list[str]:
        return [line for lines in self._together(lambda: problems(location, world=self.world)) for line in lines]

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `work`; an error on one of them is an error on all, so that nobody waits for it."""
        result, failure = None, None
        try:
            result = work()
        except (OSError, ValueError) as error:
            failure = str(error)
        answers = self.world.gather_objects((result, failure))
        for _, failure in answers:
            if failure is not None:
                raise ValueError(f"cannot use the checkpoints in {self.folder}: {failure}")
        return [result for result, _ in answers]

    def _prepare(self) -> None:
        """Try to write, rather than to fail at the first checkpoint, and remove what dead attempts began."""
        folder = folder_at(self.folder)
        folder.write("write-test", b"")
        folder.remove(["write-test"])
        for location in incomplete_checkpoints(self.folder):
            folder_at(location).remove_all()

    # ------------------------------------------------------------------ the background thread

    def _write(self, folder: Folder, token: str, staged: Staged, manifest: dict[str, Any], best: int | None) -> None:
        stem = f"rank-{self.world.rank:05d}-{token}"
        try:
            with folder.writing(f"{stem}.safetensors") as write:
                written = write_stream(write, staged.parts())
            part = {"file": f"{stem}.safetensors", **written.entry(), "ranges": staged.ranges}
            folder.write(f"{stem}.json", json.dumps(part).encode())
            if self.world.rank == 0:
                write_manifest(folder, self._complete(folder, token, manifest))
                self._prune(folder, best=best)
        except Exception as error:  # whatever it is, the training must hear of it
            self._error = error
            with contextlib.suppress(Exception):  # rank 0 should not have to wait in vain
                folder.write(f"{stem}.json", json.dumps({"error": str(error)}).encode())

    def _complete(self, folder: Folder, token: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """The manifest with the ranges of all ranks, once their files are there."""
        files: dict[str, Any] = {}
        ranges: dict[str, list[list[Any]]] = {name: [] for name in manifest["tensors"]}
        for part in self._parts(folder, token):
            files[part["file"]] = {"bytes": part["bytes"], "sha256": part["sha256"]}
            for name, (start, stop) in part["ranges"].items():
                ranges[name].append([start, stop, part["file"]])
        tensors = {name: {**entry, "ranges": sorted(ranges[name])} for name, entry in manifest["tensors"].items()}
        return {**manifest, "files": files, "tensors": tensors}

    def _parts(self, folder: Folder, token: str) -> Iterator[dict[str, Any]]:
        """What each rank says of its file, as they come."""
        missing = {f"rank-{rank:05d}-{token}.json" for rank in range(self.world.size)}
        deadline, pause = time.monotonic() + _WAIT_FOR_RANKS, 0.02
        while missing:
            for name in sorted(missing & folder.sizes().keys()):
                part: dict[str, Any] = json.loads(folder.read(name))
                if "error" in part:
                    raise OSError(f"{name.partition('.')[0]}: {part['error']}")
                missing.remove(name)
                yield part
            if missing and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{min(missing)} of {folder.location} did not appear within {_WAIT_FOR_RANKS:.0f} s: is "
                    "it one place for all ranks?"
                )
            if missing:
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)  # asking an object store costs

    def _prune(self, folder: Folder, *, best: int | None) -> None:
        """Remove what the checkpoint just completed does not need, and the checkpoints that have had their time."""
        manifest = json.loads(folder.read(MANIFEST))
        folder.remove([name for name in folder.sizes() if name != MANIFEST and name not in manifest["files"]])
        for location in complete_checkpoints(self.folder)[self.keep_last :]:
            step = step_of(location.name)
            if step != best and not (self._keep is not None and self._keep(step)):
                folder_at(location).remove([MANIFEST])  # first: half a checkpoint must not look whole
                folder_at(location).remove_all()


# ---------------------------------------------------------------------- staging


@dataclass(frozen=True)
class Staged:
    """A rank's part of a checkpoint in host memory, as the file that it will become."""

    header: bytes
    data: Tensor  # uint8
    ranges: dict[str, list[int]]
    copied: torch.cuda.Event | None

    def parts(self) -> Iterator[Any]:
        """The file's bytes, once they have arrived from the device."""
        if self.copied is not None:
            self.copied.synchronize()
        yield self.header
        yield self.data.numpy()


class Staging:
    """Host memory that is kept from save to save: fresh pages would cost the training more than the copy itself."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, pieces: dict[str, Piece]) -> Staged:
        """This rank's share of the pieces.

        From a GPU the copies are only queued: whatever the training queues behind them waits for them there, and not
        the training's thread.
        """
        shares = {name: _share(piece) for name, piece in pieces.items()}
        shares = {name: (part, start) for name, (part, start) in shares.items() if part.numel()}
        header, entries = lay_out({name: (part.dtype, (part.numel(),)) for name, (part, _) in shares.items()})
        total = max((e.stop for e in entries.values()), default=len(header)) - len(header)
        devices = {part.device for part, _ in shares.values() if part.device.type == "cuda"}
        if self._buffer.numel() < total or (devices and not self._buffer.is_pinned()):
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=bool(devices))
        targets = [self._target(entry, len(header)) for entry in entries.values()]
        torch._foreach_copy_(targets, [shares[name][0] for name in entries], non_blocking=True)
        copied = None
        for device in devices:  # one: a rank has one device
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
        ranges = {name: [start, start + part.numel()] for name, (part, start) in shares.items()}
        return Staged(header, self._buffer[:total], ranges, copied)

    def _target(self, entry: Entry, base: int) -> Tensor:
        return self._buffer[entry.start - base : entry.stop - base].view(entry.dtype)


def _share(piece: Piece) -> tuple[Tensor, int]:
    """What this rank writes of a piece, and where that starts: its share among the ranks that hold the same."""
    chunk = -(-piece.data.numel() // piece.copies)
    first = min(piece.data.numel(), piece.copy * chunk)
    return piece.data[first : first + chunk], piece.start + first
