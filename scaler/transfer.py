"""Small tensors on their way to the training device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the host, on `device`; on a CPU the tensor itself.

    A GPU copies from pinned memory, in the order of the current stream, while the host goes on: from any other memory
    the driver may keep it waiting. torch's allocator of pinned memory reuses a block only after its copy is done, so
    the caller may let go of the tensor at once.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
