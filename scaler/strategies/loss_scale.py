"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740), with torch.amp.GradScaler's constants.

Written out because the step already knows, from the global gradient norm, whether every gradient on every rank is
finite: no second pass over the gradients and no collective of its own is needed, whatever the strategy.
"""

from __future__ import annotations

from torch import Tensor


class LossScale:
    """Multiplies the loss by `value`; halves it after a non-finite step, doubles it after 2,000 good ones."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self.good_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value if self.enabled else loss

    def update(self, *, finite: bool) -> None:
        """Adapt the scale to the outcome of a step."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether a non-finite step can no longer be blamed on the scale."""
        return self.value <= 1.0

    def report(self) -> dict[str, float]:
        """The scale, for the log, where there is one."""
        return {"loss_scale": self.value} if self.enabled else {}

    def state_dict(self) -> dict[str, float]:
        """Scale and count of good steps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with a saved scale; a run without fp16 ignores it."""
        if self.enabled and state["value"] > 1.0:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
