"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740), with torch.amp.GradScaler's constants.

Written out because the step already knows, from the global gradient norm, whether every gradient on every rank is
finite: no second pass over the gradients and no collective of its own is needed, whatever the strategy. The scale lives
on the device, so that nobody waits for the norm to know it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """Multiplies the loss by `value`; halves it after a non-finite step, doubles it after 2,000 good ones.

    Attributes:
        value: the scale, float32 [] on the device; 1 where it is not enabled.
        good_steps: since it was last changed, int64 [].
    """

    def __init__(self, *, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.value = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value if self.enabled else loss

    def update(self, *, finite: Tensor) -> None:
        """Adapt the scale to the outcome of a step, bool []."""
        if not self.enabled:
            return
        good = torch.where(finite, self.good_steps + 1, 0)
        grows = good == 2000
        self.value = torch.where(finite, self.value * (1 + grows), (self.value / 2).clamp(min=1.0))
        self.good_steps = torch.where(grows, 0, good)

    @property
    def exhausted(self) -> Tensor:
        """Whether a non-finite step can no longer be blamed on the scale, bool []."""
        return self.value <= 1.0

    def report(self) -> dict[str, Tensor]:
        """The scale, for the log, where there is one."""
        return {"loss_scale": self.value} if self.enabled else {}

    def state_dict(self) -> dict[str, float]:
        """Scale and count of good steps; waits for the device."""
        return {"value": float(self.value), "good_steps": int(self.good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with a saved scale; a run without fp16 ignores it."""
        if self.enabled and state["value"] > 1.0:
            self.value = torch.full_like(self.value, float(state["value"]))
            self.good_steps = torch.full_like(self.good_steps, int(state["good_steps"]))
