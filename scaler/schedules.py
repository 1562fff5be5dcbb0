"""Schedules as pure functions of the step, and the one duration type that recipes use.

Steps count from 0 here: `step` is the number of updates already made.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_UNITS = ("steps", "epochs", "images")
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?|\d[\d_]*)\s+(step|epoch|image)s?\s*")


@dataclass(frozen=True)
class Duration:
    """An amount of training: "100 steps", "2.5 epochs" or "1e6 images"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Read a duration.

        Raises:
            ValueError: anything but a number and one of the three units.
        """
        match = _PATTERN.fullmatch(str(value))
        if not match:
            raise ValueError(
                f"{value!r} is no duration; write a number and a unit, for example '1000 steps', "
                "'10 epochs' or '1e6 images'"
            )
        return cls(float(match[1]), match[2] + "s")

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def images(self, num_samples: int | None) -> float:
        """How many images this is, where an epoch has `num_samples` (None: nobody knows, and nothing is in epochs)."""
        if self.unit == "epochs":
            assert num_samples is not None, "a stream has no epochs"
            return self.amount * num_samples
        assert self.unit == "images", "steps are of several sizes"
        return self.amount


def linear(step: int, *, length: int, start: float, end: float) -> float:
    """`length` equally spaced values from start to end, both included, then `end` (numpy's linspace)."""
    if step >= length - 1:
        return end
    return start + (end - start) * step / (length - 1)


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Half a cosine from start (step 0) towards end (reached at step `total`)."""
    if step >= total:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def warmup_cosine(step: int, *, total: int, warmup: int, peak: float, end: float, start: float = 0.0) -> float:
    """Linear from start to peak over `warmup` steps, then a cosine towards end over the rest.

    As the schedules of DINOv2: the warm-up's values are numpy's `linspace(start, peak, warmup)`, and the cosine starts
    at the peak at step `warmup`.
    """
    if step < warmup:
        return linear(step, length=warmup, start=start, end=peak) if warmup > 1 else start
    return cosine(step - warmup, total=total - warmup, start=peak, end=end)


def warmup_steps(
    step: int, *, warmup: int, peak: float, milestones: Sequence[int] = (), factor: float = 1.0, start: float = 0.0
) -> float:
    """The warm-up of `warmup_cosine`, then the peak, multiplied by `factor` from each of the (rising) milestones on.

    Without milestones the peak is kept to the end.
    """
    if step < warmup:
        return warmup_cosine(step, total=warmup, warmup=warmup, peak=peak, end=peak, start=start)
    return peak * factor ** bisect.bisect_right(milestones, step)


def warmup_momentum(step: int, *, momentum: float) -> float:
    """Momentum of an average of weights: min(momentum, (1 + step) / (10 + step)), so that it soon forgets the start."""
    return min(momentum, (1 + step) / (10 + step))
