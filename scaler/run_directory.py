"""The run directory: one run at a time writes there, and exit.json says why it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaler.lock import hold

_LET_RANK_0_SPEAK = 5.0  # seconds


@contextlib.contextmanager
def run_directory(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Rank 0 has the run directory to itself; if the run fails, exit.json says why.

    A user's error usually strikes all ranks, and the launcher ends all as soon as one has ended, so the others let rank
    0 speak first. An error of another kind on another rank is most often a peer that is gone, which is not the reason.

    Raises:
        ValueError: another run writes there.
    """
    path = run_dir / "exit.json"
    with hold(run_dir) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            path.unlink(missing_ok=True)  # of an earlier start
        try:
            yield
        except Exception as error:
            if rank == 0 or isinstance(error, ValueError):
                deadline = time.monotonic() + (_LET_RANK_0_SPEAK if rank else 0)
                while not path.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                if not path.exists():
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    write_exit(run_dir, reason="error", error=reason)
            raise


def write_exit(run_dir: Path, *, reason: str, **more: Any) -> None:
    """RUN/exit.json: why the run ended, and whether to start it again."""
    state = {"reason": reason, "requeue": reason == "signal", **more}
    with contextlib.suppress(FileNotFoundError):  # a rank that cannot see the run directory
        (run_dir / "exit.json").write_text(json.dumps(state) + "\n")
