"""What there is on this machine: bytes on its disk, processes."""

from __future__ import annotations

import contextlib
from pathlib import Path


def used_bytes(folder: Path) -> int:
    """Bytes on the disk of a folder and the files in it."""
    total = 0
    for path in [folder, *folder.glob("*")]:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.name))
    return found
