"""Linear layers whose products run in 8-bit floating point (e4m3), at twice the rate of bf16 on Hopper and later.

    y = x Wᵀ and ∂x = ∂y W in fp8: every row of x, ∂y and W (and column of W, in ∂x) is scaled by its own largest value,
                           so that it fills the range of the format, and the product is scaled back as it is written
    ∂W = ∂yᵀ x in bf16:    its sum goes over the tokens, where rounding hurts most and no size need divide by 16

(Rowwise scaling: Micikevicius et al., arXiv 2209.05433; Llama 3, arXiv 2407.21783.) Weights stay what they are, fp32
parameters of the same names: checkpoints move between fp8 and bf16 runs. On a CPU the products are emulated, exactly
but for the order of summation. torchao's `Float8Linear` does the same; what is needed here is less than its interface,
and runs with every torch that we take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_DIVISOR = 16  # of both sizes of a weight, for torch._scaled_mm


class Fp8Linear(nn.Linear):
    """An `nn.Linear` with fp8 products; an existing one becomes it by `linear.__class__ = Fp8Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → bf16 [..., out]."""
        out: Tensor = _Product.apply(x.flatten(0, -2).bfloat16(), self.weight.bfloat16())
        if self.bias is not None:
            out = out + self.bias.bfloat16()
        return out.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """x [m, in], weight [out, in], bf16 → x · weightᵀ, bf16 [m, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = scaled_product(grad, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        of_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] · b [n, k]ᵀ by way of fp8, both scaled by row: bf16 [m, n]."""
    (a8, a_scale), (b8, b_scale) = _scaled(a), _scaled(b)
    if a.device.type == "cuda":
        return torch._scaled_mm(
            a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    with torch.autocast(a.device.type, enabled=False):
        return (F.linear(a8.float(), b8.float()) * a_scale * b_scale.t()).bfloat16()


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [m, k] as fp8, and what to multiply its rows by to have it back, fp32 [m, 1]. What is not finite stays so."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_FP8), scale


def to_fp8_(blocks: Sequence[nn.Module], *, strategy: str, precision: str, device: torch.device) -> None:
    """Let the linear layers of blocks multiply in fp8.

    Raises:
        ValueError: they cannot: under ZeRO, in another precision than bf16, on a GPU without fp8, or with sizes that 16
            does not divide.
    """
    if strategy not in ("ddp", "fsdp2"):
        raise ValueError(f"strategy.fp8 goes with strategy.name=ddp or fsdp2, not {strategy}; set one, or fp8=false")
    if precision != "bf16":
        raise ValueError(f"strategy.fp8 goes with strategy.precision=bf16, not {precision}; set that, or fp8=false")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"strategy.fp8 needs an Ada or Hopper GPU, and this is a {torch.cuda.get_device_name(device)}")
    layers = [module for block in blocks for module in block.modules() if type(module) is nn.Linear]
    sizes = sorted({(m.out_features, m.in_features) for m in layers})
    if not sizes or any(size % _DIVISOR for pair in sizes for size in pair):
        raise ValueError(
            f"strategy.fp8 needs blocks with linear layers whose sizes divide by {_DIVISOR}, and here they are "
            f"{', '.join(f'{n}x{k}' for n, k in sizes) or 'none'}; set strategy.fp8=false"
        )
    for layer in layers:
        layer.__class__ = Fp8Linear
