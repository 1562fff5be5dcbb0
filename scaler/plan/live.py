"""Counts the bytes of the tensors that are alive while a piece of code runs, exactly and on any device.

    with LiveBytes() as memory:
        run()
    memory.peak                                          # of what was made inside, at most at any one time

Fake tensors count as the real ones would, so that a model can be weighed that fits into no memory at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations return: `live` now, `peak` at most. What one operation needs inside itself,
    tensors that were there before, and those on the meta device, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._resizes = patch.object(torch.UntypedStorage, "resize_", self._resized(torch.UntypedStorage.resize_))

    def __enter__(self) -> LiveBytes:
        self._resizes.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._resizes.stop()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # a wrapper: what it does to its local part comes by again
            return NotImplemented
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if id(storage) not in before and storage not in self._sizes:
                    self._sizes[storage] = size = [storage.nbytes()]
                    self._add(size[0])
                    weakref.finalize(storage, self._free, size)
        return out

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: list[int]) -> None:
        self._add(-size[0])

    def _resized(self, resize_: Callable[..., Any]) -> Callable[..., Any]:
        """FSDP2 frees a gathered weight by emptying its storage, which is no operation."""

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            known = self._sizes.get(storage)
            result = resize_(storage, size)
            if known is not None:
                self._add(size - known[0])
                known[0] = size
            return result

        return counted
