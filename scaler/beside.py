"""What a step needs next, made beside what the device is doing: on a GPU on a stream of its own, one ahead of use.

    beside = Beside(device)
    for batch in beside.each(lambda raw: method.augment(raw, seed=0, step=step), micro_batches, order=[0, 1, 0, 1]):
        ...

The host is ahead of a GPU, so that even the first of a step is made while the device is at the end of the step before.
On a CPU there is nothing beside, and each is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scaler.methods.base import Batch


class Beside:
    """The stream; one object for a whole run, since torch keeps memory by stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None

    def each(
        self, make: Callable[[Batch], Batch], sources: Sequence[Batch], *, order: Sequence[int]
    ) -> Generator[Batch, None, None]:
        """make(sources[i]) for each i of `order`; what comes twice in a row is made once.

        Args:
            make: launches the work; it does not wait for the device.
            sources: on the device when their event `ready` says so, or (without one) all that is asked of it by now is
                done.
        """
        if self._stream is None:
            made: Batch = {}
            for before, i in zip([None, *order], order, strict=False):
                if i != before:
                    made = {}  # let go of first
                    made = make(sources[i])
                yield made
            return
        ahead = self._begin(make, sources[order[0]])
        for i, after in zip(order, [*order[1:], None], strict=True):
            batch, done = ahead
            if after is not None and after != i:
                ahead = self._begin(make, sources[after])
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for tensor in _on_gpu(batch):
                tensor.record_stream(current)
            yield batch

    def _begin(self, make: Callable[[Batch], Batch], source: Batch) -> tuple[Batch, torch.cuda.Event]:
        """make(source), and the event that says when it is done."""
        assert self._stream is not None
        if "ready" in source:
            self._stream.wait_event(source["ready"])
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in _on_gpu(source):
            tensor.record_stream(self._stream)  # its memory is not given away before the stream has used it
        with torch.cuda.stream(self._stream):
            batch, done = make(source), torch.cuda.Event()
            done.record()
        return batch, done


def _on_gpu(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_cuda)
