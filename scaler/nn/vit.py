"""timm's vision transformers with all crops of all sizes in one pass per block.

The tokens of every crop lie one after the other in one [T, d] matrix: norms, linear layers and the feed-forward see
only that matrix, attention runs per crop size. Batch-subset drop path picks the rows of a branch before the branch
runs, so the skipped work is really saved; the rows come from the caller (`scaler.nn.drop_path`), so that activation
checkpointing and other layouts see the same ones.

Parameters and their names are timm's (`blocks.0.attn.qkv.weight`, …), plus `mask_token` where it is asked for: timm
weights load as they are.

Shapes: n crops, t tokens each, T = Σ n·t tokens, d channels, s kept crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from scaler.nn.base import Backbone, Features
from scaler.nn.precision import at_least_fp32, full_precision

Shapes = list[tuple[int, int]]  # (crops, tokens per crop) of each stretch of the packed matrix


class PackedBlock(nn.Module):
    """A timm `Block` (pre-norm attention and feed-forward) on packed tokens; takes over its sub-modules."""

    norm1: Any
    attn: Any
    ls1: Any
    norm2: Any
    mlp: Any
    ls2: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, x: Tensor, shapes: Shapes, tokens: Tensor | None = None, kept: Shapes | None = None) -> Tensor:
        """x [T, d] → [T, d]; `tokens`, int64 [2, K], run attention and feed-forward, where not all do: those of whole
        crops, whose stretches are `kept`.
        """
        if tokens is None or kept is None:
            x = x + self._attention(x, shapes)
            return x + self._feed_forward(x)
        scales = [n / max(s, 1) for (n, _), (s, _) in zip(shapes, kept, strict=True)]
        for branch, chosen in enumerate(tokens.unbind(0)):
            part = _TakeRows.apply(x, chosen)
            out = self._attention(part, kept) if branch == 0 else self._feed_forward(part)
            if len(set(scales)) == 1:
                out = out * scales[0]
            else:
                parts = out.split([s * t for s, t in kept])
                out = torch.cat([o * scale for o, scale in zip(parts, scales, strict=True)])
            x = _AddToRows.apply(x, chosen, part, out)
        return x

    def _attention(self, x: Tensor, shapes: Shapes) -> Tensor:
        attn = self.attn
        x = self.norm1(x)
        qkv = attn.qkv(x)
        outputs = []
        for part, (n, t) in zip(qkv.split([n * t for n, t in shapes]), shapes, strict=True):
            q, k, v = part.view(n, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
            outputs.append(out.transpose(1, 2).reshape(n * t, attn.num_heads * attn.head_dim))
        out = attn.norm(torch.cat(outputs))
        gate = getattr(attn, "gate", None)  # newer than the oldest timm we take
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.ls1(attn.proj(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class _TakeRows(torch.autograd.Function):
    """x [T, d], tokens int64 [s], each once → x[tokens].

    Since no row comes twice, gradients are written where torch's `index_select` would add them: by atomics, which in
    bf16 inductor leaves to a kernel that sorts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy(0, tokens, grad), None


class _AddToRows(torch.autograd.Function):
    """x [T, d] with `out` [s, d] added to its rows `tokens`, whose values `part` [s, d] are at hand: see `_TakeRows`.

    The gradient of x is the output's, as it is, and reaches `part` by way of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, part: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.dtype = out.dtype
        return x.index_copy(0, tokens, part + out.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return grad, None, None, grad.index_select(0, tokens).to(ctx.dtype)


def kept_tokens(keep: Sequence[Tensor], shapes: Shapes) -> tuple[Tensor, Shapes]:
    """Positions in the packed matrix of the tokens of the kept crops, and their shapes.

    Args:
        keep: for each stretch, int64 [blocks, 2, s], the crops that run the two branches of every block.
        shapes: of the stretches.

    Returns:
        int64 [blocks, 2, K], for all blocks at once (a few kernels in place of a few for each), and (s, t) a stretch.
    """
    tokens, start = [], 0
    for rows, (n, t) in zip(keep, shapes, strict=True):
        tokens.append((start + rows[..., None] * t + torch.arange(t, device=rows.device)).flatten(-2))
        start += n * t
    return torch.cat(tokens, dim=-1), [(rows.shape[-1], t) for rows, (_, t) in zip(keep, shapes, strict=True)]


def can_pack(model: Any) -> bool:
    """Whether a timm model is a plain pre-norm ViT with class token, which `PackedViT` runs exactly."""
    return (
        type(model) is timm_vit.VisionTransformer
        and model.cls_token is not None
        and isinstance(model.fc_norm, nn.Identity)
        and all(type(b) is timm_vit.Block and type(b.attn) is Attention for b in model.blocks)
    )


class BlockList(nn.ModuleList):
    """The blocks under timm's parameter names (`blocks.0…`); called, it lists them, as every backbone's `blocks()`."""

    def forward(self) -> list[nn.Module]:
        """The blocks in order."""
        return list(self)


class PackedViT(Backbone):
    """A timm `VisionTransformer` (made with `dynamic_img_size=True`) that runs packed; takes over its sub-modules."""

    is_vit = True
    patch_size: int
    blocks: BlockList

    def __init__(self, model: Any, *, drop_path: float = 0.0, mask_token: bool = False) -> None:
        super().__init__()
        if not can_pack(model) or not model.dynamic_img_size:
            raise ValueError(
                "PackedViT takes a plain timm VisionTransformer with class token and dynamic_img_size=True"
            )
        self.num_features = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = model.patch_embed.grid_size
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.no_embed_class: bool = model.no_embed_class
        self.drop_path = drop_path
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, self.num_features)) if mask_token else None
        self.patch_embed = model.patch_embed
        self.norm_pre = model.norm_pre
        self.blocks = BlockList(PackedBlock(block) for block in model.blocks)
        self.norm = model.norm

    def forward(
        self,
        crops: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """See `Backbone.forward`."""
        batches = [self.embed(x, mask) for x, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        shapes = [(x.shape[0], x.shape[1]) for x in batches]
        x = torch.cat([x.flatten(0, 1) for x in batches])
        if keep is None:
            for block in self.blocks:
                x = block(x, shapes)
        else:
            tokens, kept = kept_tokens(keep, shapes)
            for block, chosen in zip(self.blocks, tokens.unbind(0), strict=True):
                x = block(x, shapes, chosen, kept)
        x = self.norm(x)
        outputs = []
        for part, (n, t) in zip(x.split([n * t for n, t in shapes]), shapes, strict=True):
            part = part.view(n, t, self.num_features)
            outputs.append(Features(cls=part[:, 0], patches=part[:, self.num_prefix_tokens :]))
        return outputs

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [n, t, d] of images [n, 3, h, w]: patches (or the mask token), positions, class and registers."""
        x = self.patch_embed(images)  # [n, h', w', d]
        n, height, width, _ = x.shape
        x = x.flatten(1, 2)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("masks need a mask token: build the backbone with mask_token=True")
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix = [p.expand(n, -1, -1) for p in (self.cls_token, self.reg_token) if p is not None]
        if self.pos_embed is None:
            return self.norm_pre(torch.cat([*prefix, x], dim=1))
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = resize_positions(
            self.pos_embed, num_prefix_tokens=num_prefix, old=self.grid_size, new=(height, width)
        )
        if self.no_embed_class:  # the class token's position is part of the token; registers have none
            x = torch.cat([*prefix, x + positions], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + positions
        return self.norm_pre(x)


def resize_positions(
    positions: Tensor, *, num_prefix_tokens: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Position embedding [1, prefix + h·w, d] for another grid, by antialiased bicubic interpolation (as timm's).

    Written as two matrix products, since the backward pass of torch's interpolation has no deterministic CUDA kernel.
    """
    if old == new:
        return positions
    prefix, grid = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    with full_precision(positions):
        grid = at_least_fp32(grid).view(*old, -1)
        rows, columns = (_resize_matrix(o, n, like=grid) for o, n in zip(old, new, strict=True))
        grid = torch.einsum("yh,xw,hwd->yxd", rows, columns, grid)
    return torch.cat([prefix, grid.flatten(0, 1)[None].to(positions.dtype)], dim=1)


@torch.no_grad()
def _resize_matrix(old: int, new: int, *, like: Tensor) -> Tensor:
    """The matrix [new, old] of a one-dimensional antialiased bicubic resize: what it makes of the unit vectors."""
    units = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(units, size=(new, old), mode="bicubic", antialias=True)[0, 0]
