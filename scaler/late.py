"""Flags of the device that the host reads when they have come, so that nothing waits for them.

late = Late(device)
late.put(step, flag)                            # after every step
for step, flag in late.known(): ...             # those of the steps that the device has finished
for step, flag in late.wait(): ...              # all of them
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Late:
    """Flags on their way to the host, in order; from a CPU they come at once."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._coming: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, flag: Tensor) -> None:
        """Send a flag, bool [], of `step` on its way; of the current stream."""
        if not self._cuda:
            self._coming.append((step, flag, None))
            return
        host = torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._coming.append((step, host, event))

    def known(self) -> list[tuple[int, bool]]:
        """The steps whose flags have come since the last call, with them."""
        found = []
        while self._coming and (self._coming[0][2] is None or self._coming[0][2].query()):
            step, flag, _ = self._coming.popleft()
            found.append((step, bool(flag.numpy())))
        return found

    def wait(self) -> list[tuple[int, bool]]:
        """All the steps whose flags have not been read, after waiting for the device."""
        for _, _, event in self._coming:
            if event is not None:
                event.synchronize()
        return self.known()
