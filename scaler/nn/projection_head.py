"""The projection head of contrastive methods: an MLP with batch norm over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scaler.collectives import World
from scaler.nn.batch_norm import GlobalBatchNorm
from scaler.nn.init import assert_initialised, fill_nan_

BATCH_NORM_MOMENTUM = 0.1  # torch's convention: running statistics decay by 0.9 a step


class ProjectionHead(nn.Module):
    """Features [n, in] to embeddings [n, out], as in SimCLR (arXiv 2002.05709; three layers: arXiv 2006.10029).

    Every layer is linear, then batch norm, then ReLU; the last has neither ReLU nor bias (its norm scales only). The
    linear layers have no bias where a norm follows. Without batch norm they have one, but for the last.

    Raises:
        ValueError: fewer than one layer.
    """

    def __init__(
        self,
        in_features: int,
        *,
        world: World,
        hidden_features: int | None = None,
        out_features: int = 128,
        num_layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"a head of {num_layers} layers; it needs at least 1")
        hidden = in_features if hidden_features is None else hidden_features
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            last = i == num_layers - 1
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=not batch_norm and not last))
            if batch_norm:
                norm = GlobalBatchNorm(widths[i + 1], world=world, momentum=BATCH_NORM_MOMENTUM, bias=not last)
                layers.append(norm)
            if not last:
                layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-normal weights for the layers that a ReLU follows and the same for the last; norms at identity."""
        fill_nan_(self)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, GlobalBatchNorm):
                layer.reset_parameters()
        assert_initialised(self)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in] to [n, out]."""
        return self.layers(features)
