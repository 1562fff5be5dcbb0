"""An exponential moving average of trained modules, which is evaluated in their stead (Polyak & Juditsky 1992).

average = Average({"backbone": backbone, "head": head})
average.follow_(live, weight=1 - momentum, lerp_=strategy.lerp_)        # after every step
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Average(nn.ModuleDict):
    """Frozen copies of modules, by name, always in evaluation mode."""

    def __init__(self, live: Mapping[str, nn.Module]) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in live.items()})
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Average:
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def follow_(
        self,
        live: Mapping[str, nn.Module],
        *,
        weight: float,
        lerp_: Callable[[Sequence[Tensor], Sequence[Tensor], float], None],
    ) -> None:
        """average += weight · (live − average), of parameters by `lerp_`, which knows where their shards are.

        Buffers (the running statistics of batch norm) are whole on every rank; their counts are copied.
        """
        pairs = [(self[name], module) for name, module in live.items()]
        mine = [parameter for average, _ in pairs for parameter in average.parameters()]
        theirs = [parameter for _, module in pairs for parameter in module.parameters()]
        lerp_(mine, theirs, weight)
        buffers = [pair for average, module in pairs for pair in zip(average.buffers(), module.buffers(), strict=True)]
        for floating in (True, False):
            chosen = [(old, new) for old, new in buffers if old.is_floating_point() == floating]
            if chosen:
                old, new = (list(tensors) for tensors in zip(*chosen, strict=True))
                torch._foreach_lerp_(old, new, weight) if floating else torch._foreach_copy_(old, new)
