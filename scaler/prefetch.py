"""Batches on the training device, one ahead of use.

A GPU's copy of the next batch runs while the current one is computed: a thread takes batches from the loader (whose
pixels lie in pinned memory) and copies them on a stream of its own, where it also decodes and cuts what the loader left
to the GPU (`data.decode: gpu`). On a CPU there is nothing to move and no thread.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import torch

from scaler.methods.base import Batch
from shards.device_decode import DeviceDecoder

T = TypeVar("T")
_LOOK = 0.1  # seconds between two looks of a waiting thread at whether it is still wanted


def on_device(batches: Iterator[Batch], device: torch.device, *, say: Callable[[str], None] = print) -> Iterator[Batch]:
    """The batches with their pixels on `device`; indices and labels stay on the CPU, where they are checked and used.

    From a GPU each also holds `transfer`, the two events between which its pixels were copied, where the GPU decodes
    `device_decode`, those between which it decoded and cut, and `ready`, the one after which they may be used. `say` is
    told what the user should know of the decoding.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, decoder = torch.cuda.Stream(device), DeviceDecoder(device)

    def move(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            begun = _event()
            views = {name: view.to(device, non_blocking=True) for name, view in batch["views"].items()}
            ready = _event()
            batch = {**batch, "views": views, "transfer": (begun, ready)}
            if "encoded" in batch:
                begun, batch = ready, decoder(batch)
                ready = _event()
                batch["device_decode"] = (begun, ready)
        return {**batch, "ready": ready}

    with contextlib.closing(ahead(move(batch) for batch in batches)) as moved:
        for batch in moved:
            current = torch.cuda.current_stream(device)
            current.wait_event(batch["ready"])
            for view in batch["views"].values():
                view.record_stream(current)  # its memory is not given away before `current` has used it
            for text in batch.get("notes", ()):  # by this thread, whose the log is
                say(text)
            yield batch


def _event() -> torch.cuda.Event:
    """One that the current stream has just recorded."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
