"""Python's garbage collection during training."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def short_pauses() -> Iterator[Callable[[], None]]:
    """Gives a function to call once everything long-lived is there: garbage collection then passes over it.

    Python's full collections look at every object that there is, a model's, torch's and all imported modules', and the
    step stands still meanwhile, on each rank at another time, while all others wait. What has come since is still
    collected as ever.
    """

    def settle() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield settle
    finally:
        gc.unfreeze()
