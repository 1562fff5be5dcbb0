"""The DINO head against torch's own weight normalisation, in three precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scaler.nn.dino_head import DINOHead


def head() -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(24, num_prototypes=50, hidden=32, bottleneck=16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_a_head_made_of_torchs_modules_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    ours = head().to(dtype)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 50, bias=False).to(dtype))
    normal = last.parametrizations.weight
    parameters = dict(ours.named_parameters())
    theirs = {**parameters, "last_layer.weight_g": normal.original0, "last_layer.weight_v": normal.original1}
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in parameters.values():
                p.normal_() if p.dim() == 1 else p.uniform_(-0.5, 0.5)
            ours.last_layer.weight_g.uniform_(0.5, 2.0)
            for name in ("last_layer.weight_g", "last_layer.weight_v"):
                theirs[name].copy_(parameters[name])
        x, w = torch.randn(7, 24, dtype=dtype), torch.randn(7, 50, dtype=dtype)
        z = ours.mlp(x)
        expected = last(z / z.square().sum(dim=1, keepdim=True).sqrt())
        scores = ours(x)
        assert (scores - expected).norm() < tolerance * expected.norm()
        gradients = torch.autograd.grad((scores * w).sum(), list(parameters.values()))
        wanted = torch.autograd.grad((expected * w).sum(), list(theirs.values()))
        for gradient, value in zip(gradients, wanted, strict=True):
            assert (gradient - value).norm() < 10 * tolerance * value.norm()


def test_layers_and_initial_weights() -> None:
    h = DINOHead(384, num_prototypes=4096)
    assert [type(layer).__name__ for layer in h.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    shapes = {name: tuple(p.shape) for name, p in h.named_parameters()}
    assert shapes["mlp.0.weight"] == (2048, 384) and shapes["mlp.2.weight"] == (2048, 2048)
    assert shapes["mlp.4.weight"] == (256, 2048)
    assert shapes["last_layer.weight_g"] == (4096, 1) and shapes["last_layer.weight_v"] == (4096, 256)
    assert (h.last_layer.weight_g == 1).all() and h.last_layer.weight_g.requires_grad
    torch.testing.assert_close(h.prototypes().norm(dim=1), torch.ones(4096))
    assert abs(float(h.mlp[2].weight.detach().std()) - 0.02) < 1e-4 and (h.mlp[0].bias == 0).all()


def test_bottlenecks_have_unit_length_in_fp32_under_autocast() -> None:
    h, x = head(), torch.randn(9, 24)
    expected = h(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = h.bottleneck(x)
        assert z.dtype == torch.float32 and h.prototypes().dtype == torch.float32
        assert h.scores(z).dtype == torch.bfloat16
        torch.testing.assert_close(z.norm(dim=1), torch.ones(9))
        torch.testing.assert_close(h(x).float(), expected, rtol=0.05, atol=0.03)
    zero = h.mlp[4]
    nn.init.zeros_(zero.weight)
    z = h.bottleneck(x)  # zero vectors stay zero, and their gradient is finite
    z.sum().backward()
    assert torch.equal(z, torch.zeros_like(z)) and bool(zero.weight.grad.isfinite().all())


def test_no_rows_give_zero_gradients_to_all_parameters() -> None:
    h = head()
    F.softmax(h(torch.zeros(0, 24)), dim=-1).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in h.parameters())
