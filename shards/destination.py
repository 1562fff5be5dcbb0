"""Where a conversion writes to, a folder of this machine or a URL, and what an earlier run has left there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.offsets import OffsetTable, Skipped, load_offsets, offset_name, parse_offsets
from shards.places import Location, folder_at
from shards.storage import remove_temporaries, write_atomic

STATE_NAME = "convert.json"


@dataclass(frozen=True)
class WrittenShard:
    """What a shard has become; `name` is below the destination, `num_samples` may be 0."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    skipped: list[Skipped]


class Destination:
    """The folder or URL `location`, in which shards lie in `parts` (folders below it, "" for itself).

    Raises:
        ValueError: the folder cannot be made, or the URL is not one that we can write to.
    """

    def __init__(self, location: Location, *, parts: Sequence[str]) -> None:
        self.location, self.parts = location, parts
        self._folder = folder_at(location)
        if isinstance(location, Path):
            try:
                for part in parts:
                    (location / part).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"cannot make the folder {location}: {error.strerror}") from error

    def place(self, name: str) -> Location:
        """Where a file lies; `name` may have a folder in it."""
        place = self.location
        for part in name.split("/"):
            place = place / part if part else place
        return place

    def finished(self, names: Sequence[str]) -> dict[str, WrittenShard]:
        """Those of the shards that an earlier run has finished: the offset file of a shard is written after it."""
        sizes = self._sizes()
        chosen = [name for name in names if name in sizes and offset_name(name) in sizes]
        with ThreadPoolExecutor(self._folder.threads) as pool:
            tables = dict(zip(chosen, pool.map(self._table, chosen), strict=True))
        return {
            name: WrittenShard(name, table.num_bytes, len(table), table.sha256, table.skipped)
            for name, table in tables.items()
            if table is not None and (table.shard_name, table.num_bytes) == (name.rpartition("/")[2], sizes[name])
        }

    def holds_shards(self) -> bool:
        """Whether something is there that training would read."""
        return any(name.endswith(".tar") or name.rpartition("/")[2] == "index.json" for name in self._sizes())

    def remove(self, names: Sequence[str]) -> None:
        """Remove shards and their offset files, where they are."""
        sizes = self._sizes()
        self._folder.remove([file for name in names for file in (name, offset_name(name)) if file in sizes])

    def read_state(self) -> Any:
        """What `write_state` wrote, None where there is nothing; `ValueError` when it cannot be read."""
        try:
            return json.loads(self._folder.read(STATE_NAME))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"cannot read what {self.location} holds: {error}") from error
        except ValueError as error:
            place = self.location / STATE_NAME
            raise ValueError(f"cannot read {place} ({error}); delete {self.location} and convert again") from error

    def write_state(self, state: dict[str, Any]) -> None:
        """Remember what is being made here, for a run that continues."""
        content = json.dumps(state, indent=1).encode()
        if isinstance(self.location, Path):
            write_atomic(self.location / STATE_NAME, content)
        else:
            self._folder.write(STATE_NAME, content)

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold a local folder against a second conversion; the system lets go of it when the process dies."""
        if not isinstance(self.location, Path):  # stores have no locks; what they get appears whole and is the same
            yield
            return
        descriptor = os.open(self.location, os.O_RDONLY)
        try:
            _lock(descriptor, self.location)
            for part in {"", *self.parts}:
                remove_temporaries(self.location / part)
            yield
        finally:
            os.close(descriptor)

    def _sizes(self) -> dict[str, int]:
        """The files here and in the parts, and their bytes."""
        if not isinstance(self.location, Path):
            return self._folder.sizes()
        sizes = {}
        for part in {"", *self.parts}:
            with os.scandir(self.location / part) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        sizes[f"{part}/{entry.name}" if part else entry.name] = entry.stat().st_size
        return sizes

    def _table(self, name: str) -> OffsetTable | None:
        place = self.place(offset_name(name))
        with contextlib.suppress(ValueError):
            if isinstance(place, Path):
                return load_offsets(place)
            return parse_offsets(self._folder.read(offset_name(name)), place)
        return None


def _lock(descriptor: int, folder: Path) -> None:
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if attempt == 9:
                raise ValueError(f"another conversion is writing to {folder}; wait until it has ended") from error
            time.sleep(0.1)  # the workers of a killed run are still ending
        except OSError:  # a file system without locks
            return
