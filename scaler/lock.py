"""One run directory, one run: a lock that ends with the process that holds it, however that ends.

    with hold(run_dir):
        …                                   # nobody else writes run_dir, on this machine or over NFS

It is a POSIX record lock, which the kernel gives up at SIGKILL, which works on NFS, and which forked loader workers do
not inherit. It would also end if this process opened and closed the file once more, so nobody else here may.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_NAME = ".lock"
_POLL = 0.2  # seconds
_WAIT_HERE = 10.0  # seconds that a dying process on this machine may need
_WAIT_ELSEWHERE = 100.0  # an NFS server gives up the locks of a machine that is gone after 90 s
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(run_dir: Path, *, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of a run directory, made if need be, while the `with` lasts.

    Args:
        wait: seconds to wait for another holder to end; default: as long as one that is dying may need.

    Raises:
        ValueError: another run holds it; names its machine and process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _NAME).open("a+") as file:
        if not _lock(file) and not _wait_for(file, run_dir=run_dir, seconds=wait):
            raise ValueError(
                f"{run_dir} is being written by another run ({_describe(file)}); wait for its end, stop it, or choose "
                "another run.dir"
            )
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}
        file.truncate(0)
        file.write(json.dumps(me) + "\n")
        file.flush()
        yield


def _wait_for(file: IO[str], *, run_dir: Path, seconds: float | None) -> bool:
    if seconds is None:
        seconds = _WAIT_HERE if _holder(file).get("host") == socket.gethostname() else _WAIT_ELSEWHERE
    if seconds:
        print(f"{run_dir} is held by {_describe(file)}; waiting {seconds:.0f} s for its end", file=sys.stderr)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_POLL)
        if _lock(file):
            return True
    return False


def _lock(file: IO[str]) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: this file system has no locks ({error.strerror}): nothing keeps a second run out of the run "
              "directory", file=sys.stderr)  # fmt: skip
    return True


def _holder(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _describe(file: IO[str]) -> str:
    holder = _holder(file)
    if not holder:
        return "which has not said its name"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('start')}"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
