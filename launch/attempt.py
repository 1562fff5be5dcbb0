"""Runs one attempt at a training and ends with the exit code that launchers hide.

    python -m launch.attempt runs/first torchrun --nproc-per-node 8 -m scaler.train dinov2/demo run.dir=runs/first

torchrun answers a SIGTERM with 1, whatever its workers say. What the training itself said is in RUN/exit.json: 75 if it
stopped at a checkpoint and wants to be started again, otherwise the command's own code. Kubernetes' pods run this.
Signals that ask a training to stop are passed on, also as process 1 of a container.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.local import run

START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h, as scaler.train has it
_PATIENCE = 10.0  # seconds until the word of rank 0, perhaps of another machine, is visible here


def run_attempt(run_dir: Path, command: Sequence[str]) -> int:
    """Run `command`, which trains in `run_dir`, to its end.

    A file that an earlier attempt left does not count, so that what fails before it trains is a failure.

    Returns:
        0 if the command succeeded, 75 if the training wants to be started again, otherwise the command's exit code.
    """
    path = run_dir / "exit.json"
    before = _read(path)
    code = run(command)
    deadline = time.monotonic() + _PATIENCE
    while code != 0 and time.monotonic() < deadline:
        said = _read(path)
        if said is not None and said != before:
            return START_AGAIN if json.loads(said[1])["requeue"] else code
        time.sleep(0.2)
    return code


def _read(path: Path) -> tuple[int, str] | None:
    """Time and text of a file; None if there is none, or none that is complete."""
    try:
        with path.open() as file:  # opening asks a network file system anew; stat may answer from its cache
            stamp, text = path.stat().st_mtime_ns, file.read()
        json.loads(text)
    except (OSError, ValueError):
        return None
    return stamp, text


if __name__ == "__main__":
    sys.exit(run_attempt(Path(sys.argv[1]), sys.argv[2:]))
