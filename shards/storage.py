"""Files written whole or not at all, and what we say when the disk refuses.

Every lasting file goes through `atomic_file`: a temporary file beside it, fsync, rename. A reader, or the next run
after a crash, therefore sees a complete file or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TEMPORARY = ".partial"  # ending of temporary files: NAME.PID.partial


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """Yield the descriptor of a temporary file that becomes `path` when the block ends, and is removed if it fails.

    An `OSError` in the block (a full disk, a quota, a lost mount) becomes a one-line `ValueError` naming the file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ValueError(_write_error(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; nothing is touched when the file already holds these bytes."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with atomic_file(path) as descriptor:
        write_all(descriptor, data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written (one call may write less, at most 2 GiB on Linux)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed run left in `folder`."""
    for file in folder.glob(f"*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            file.unlink()


def sha256_file(path: Path) -> str:
    """The sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_size(text: str) -> int:
    """`256MB`, `1.5 GiB`, `4096` → bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|TB)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 256MB, 1GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def printable(path: str) -> str:
    """A path for messages: one line, valid utf-8, whatever bytes the file name holds."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _write_error(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {path}: {error.strerror}; free some space (or choose another folder) and run again"
    return f"cannot write {path}: {error.strerror or error}; check that the folder exists and can be written to"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
