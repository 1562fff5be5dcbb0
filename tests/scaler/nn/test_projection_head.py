"""The head's layers, widths, biases and norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scaler.collectives import World
from scaler.nn.batch_norm import GlobalBatchNorm
from scaler.nn.projection_head import ProjectionHead


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_layers(num_layers: int, batch_norm: bool) -> None:
    head = ProjectionHead(12, world=World(), num_layers=num_layers, batch_norm=batch_norm)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    norms = [m for m in head.modules() if isinstance(m, GlobalBatchNorm)]
    assert [(m.in_features, m.out_features) for m in linear] == [(12, 12)] * (num_layers - 1) + [(12, 128)]
    assert len(norms) == (num_layers if batch_norm else 0)
    assert [m.bias is not None for m in linear] == [not batch_norm] * (num_layers - 1) + [False]
    assert [m.bias is not None for m in norms] == ([True] * (num_layers - 1) + [False] if batch_norm else [])
    assert all(m.momentum == pytest.approx(0.1) for m in norms)
    assert sum(isinstance(m, nn.ReLU) for m in head.modules()) == num_layers - 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_output_is_the_formulas(dtype: torch.dtype, tolerance: float) -> None:
    head = ProjectionHead(6, world=World(), hidden_features=20, out_features=4, num_layers=3).to(dtype)
    first, second, third = (m.weight for m in head.modules() if isinstance(m, nn.Linear))
    assert first.shape == (20, 6) and third.shape == (4, 20)

    def norm(h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()

    for seed in range(100):
        torch.manual_seed(seed)
        x = torch.randn(32, 6, dtype=dtype)
        expected = norm(F.relu(norm(F.relu(norm(x @ first.T)) @ second.T)) @ third.T)
        assert (head(x) - expected).norm() < tolerance * expected.norm()


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="a head of 0 layers"):
        ProjectionHead(6, world=World(), num_layers=0)
