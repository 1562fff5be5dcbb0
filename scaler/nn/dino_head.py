"""The projection head of DINO (arXiv 2104.14294): MLP to a normalised bottleneck, then scores against prototypes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaler.nn.init import InitialWeights, assert_initialised, fill_nan_, init_linear_
from scaler.nn.precision import at_least_fp32, full_precision


class DINOHead(nn.Module):
    """Three GELU layers, L2 normalisation, and K prototypes as a weight-normalised layer without bias.

    The two halves are called separately, since bottlenecks are what the teacher's pass leaves behind while scores are
    recomputed by tile and never kept.

    Shapes: n rows, d features, b bottleneck width, K prototypes.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        initial_weights: InitialWeights = "published",
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = Prototypes(bottleneck, num_prototypes=num_prototypes)
        self.init_weights(initial_weights)

    def init_weights(self, weights: InitialWeights) -> None:
        """Truncated normal for the MLP (see `init_linear_`), zero biases; unit prototypes in random directions."""
        fill_nan_(self)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                init_linear_(layer, weights=weights)
        self.last_layer.init_weights()
        assert_initialised(self)

    def bottleneck(self, x: Tensor) -> Tensor:
        """[n, d] → [n, b] of unit length, at least fp32."""
        return F.normalize(at_least_fp32(self.mlp(x)), dim=-1, eps=1e-12)

    def prototypes(self) -> Tensor:
        """The prototypes [K, b] that bottlenecks are scored against, at least fp32."""
        return self.last_layer()

    def scores(self, bottlenecks: Tensor) -> Tensor:
        """[n, b] → [n, K], in autocast's precision where that is on."""
        return F.linear(bottlenecks, self.prototypes())

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] → scores [n, K]."""
        return self.scores(self.bottleneck(x))


class Prototypes(nn.Module):
    """K vectors g·v/‖v‖ (weight normalisation, arXiv 1602.07868) with plain parameters `weight_g`, `weight_v`."""

    def __init__(self, width: int, *, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, width))

    @torch.no_grad()
    def init_weights(self) -> None:
        """g = 1; v uniform within ±1/√width, torch's own range of a linear layer."""
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        self.weight_g.fill_(1.0)
        self.weight_v.uniform_(-bound, bound)

    def forward(self) -> Tensor:
        """The vectors, [K, width], at least fp32."""
        with full_precision(self.weight_v):
            v = at_least_fp32(self.weight_v)
            return v * (at_least_fp32(self.weight_g) / v.norm(dim=1, keepdim=True))
