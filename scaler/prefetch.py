"""Batches on the training device, one ahead of use.

A GPU's copy of the next batch runs while the current one is computed: a thread takes batches from the loader (whose
pixels lie in pinned memory) and copies them on a stream of its own. On a CPU there is nothing to move and no thread.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

from scaler.methods.base import Batch

T = TypeVar("T")
_LOOK = 0.1  # seconds between two looks of a waiting thread at whether it is still wanted


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their pixels on `device`; indices and labels stay on the CPU, where they are checked and used.

    From a GPU each also holds `transfer`, the two events between which its pixels were copied, and `ready`, the one after
    which they may be used.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def move(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            views = {name: view.to(device, non_blocking=True) for name, view in batch["views"].items()}
            last.record()
        return {**batch, "views": views, "transfer": (first, last), "ready": last}

    with contextlib.closing(ahead(move(batch) for batch in batches)) as moved:
        for batch in moved:
            current = torch.cuda.current_stream(device)
            current.wait_event(batch["transfer"][1])
            for view in batch["views"].values():
                view.record_stream(current)  # its memory is not given away before `current` has used it
            yield batch


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items, each made in a thread while the one before is in use; errors come through at their place.

    Closing it closes `items`, after the item that is being made.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    unwanted = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not unwanted.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=_LOOK)
                return

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item, None)
                    if unwanted.is_set():
                        return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=make, daemon=True, name="batches ahead")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        unwanted.set()
        thread.join()
