"""Small tensors on their way to the training device, without waiting for it.

A GPU copies from pinned memory, in the order of the current stream, while the host goes on: from any other memory the
driver may keep it waiting. torch's allocator of pinned memory reuses a block only after its copy is done, so that the
host may let go of it at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, at which every dtype can begin


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the host, on `device`; on a CPU the tensor itself."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`send` of several tensors of the host in one copy; on a GPU they lie in one piece of memory."""
    if device.type != "cuda":
        return [send(tensor, device) for tensor in tensors]
    return unpack(pack(tensors, pin=True).to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Tensors of the host one after the other, uint8 [bytes]; in pinned memory if `pin`."""
    packed = torch.empty(sum(_sizes(tensors)), dtype=torch.uint8, pin_memory=pin)
    for place, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What was packed, as views of it, with the dtypes and shapes of `like`."""
    parts = packed.split(_sizes(like))
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(parts, like, strict=True)]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
