"""Reading over a network that fails now and then.

What may pass (a cut connection, a server that restarts, 503) is tried again, ever less often, until too much time has
passed since it last worked. What arrives, but wrong (damaged on its way, too short), is tried a few times: it will
hardly get better with time. What is missing or refused is an error at once.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_VARIABLE = "SCALER_REMOTE_SECONDS"
_SECONDS = 300.0
_ATTEMPTS = 4  # at something that arrives, but wrong
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
_SILENCE = 10.0  # seconds of failures before the user is told
_jitter = random.Random()  # of its own: the global generator belongs to the user


def patience() -> float:
    """Seconds that a read is tried again: `SCALER_REMOTE_SECONDS`, or 300."""
    return float(os.environ.get(_VARIABLE, _SECONDS))


def retry(
    read: Callable[[], T],
    *,
    seconds: float | None = None,
    final: tuple[type[OSError], ...] = (FileNotFoundError, PermissionError),
) -> T:
    """`read()`, called again while it raises: `OSError` for up to `seconds` (None: `patience()`), `ValueError` (wrong
    content) a few times. Says so on standard error when that takes long.

    Args:
        final: errors that no waiting helps.

    Raises:
        ValueError: the last error in one line; its cause is an `OSError` where nothing arrived.
    """
    seconds = patience() if seconds is None else seconds
    start, wrong, wait, told = time.monotonic(), 0, _FIRST_WAIT, False
    while True:
        try:
            return read()
        except ValueError:
            wrong += 1
            if wrong == _ATTEMPTS:
                raise
        except final as error:
            raise ValueError(str(error)) from error
        except OSError as error:
            passed = time.monotonic() - start
            if passed + wait > seconds:
                raise ValueError(f"{error} (tried for {passed:.0f} s; {_VARIABLE} sets for how long)") from error
            if passed > _SILENCE and not told:
                print(f"warning: {error}; trying again for up to {seconds:.0f} s", file=sys.stderr, flush=True)
                told = True
        time.sleep(wait * _jitter.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_WAIT)
