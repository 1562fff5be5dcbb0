"""How long each part of a step takes, without making the step wait for its device.

    parts = Parts(device)
    parts.follow(method)
    for _ in range(10):
        stepper.step(parts.at)
    torch.cuda.synchronize()
    parts.read()                       # one {part: seconds} a step

On a GPU the marks are events on the stream, so a part lasts from when the device has done all before it until it has
done the part; on a CPU they are the clock's. A GPU's augmentation runs on a stream beside the step, so its part is what
the step waits for it (`scaler bench augment` measures it alone).
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from scaler.nn.base import Backbone

END = "end"
# What a step says that begins, and what that is called for people.
NAMES = {
    "data": "data",
    "augment": "augmentation",
    "observe": "teacher",
    "combine": "targets",
    "forward": "student",
    "learn": "heads and losses",
    "backward": "backward",
    "update": "optimiser",
    "average": "EMA",
}

Mark = torch.cuda.Event | float


class Parts:
    """Marks of when each part of each step began."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Mark]] = []
        self._inside = False  # a backbone, in `learn`

    def at(self, part: str) -> None:
        """A part begins (a key of `NAMES`), or the step ends."""
        mark: Mark
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))

    def follow(self, method: nn.Module) -> None:
        """Tell the passes through backbones apart from the rest of `learn`: the student's, with gradient, and those of
        a (gram) teacher."""

        def enter(module: nn.Module, arguments: Any) -> None:
            if self._marks and self._marks[-1][0] == "learn":
                self.at("forward" if torch.is_grad_enabled() else "observe")
                self._inside = True

        def leave(module: nn.Module, arguments: Any, out: Any) -> None:
            if self._inside:
                self.at("learn")
                self._inside = False

        for module in method.modules():
            if isinstance(module, Backbone):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)

    def read(self) -> list[dict[str, float]]:
        """Seconds by part (names for people) of every step since the last reading; a GPU must be done with them."""
        marks, self._marks = self._marks, []
        steps: list[dict[str, float]] = []
        current: dict[str, float] = defaultdict(float)
        for (part, begun), (_, over) in itertools.pairwise(marks):
            if part == END:
                steps.append(dict(current))
                current.clear()
            else:
                current[NAMES[part]] += _seconds(begun, over)
        return [*steps, dict(current)] if marks else []


def _seconds(begun: Mark, over: Mark) -> float:
    if isinstance(begun, float) or isinstance(over, float):
        assert isinstance(begun, float) and isinstance(over, float), "one clock"
        return over - begun
    return begun.elapsed_time(over) / 1000
