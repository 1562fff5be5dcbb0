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

    def forward(self, x: Tensor, shapes: Shapes, keep: Sequence[Tensor] | None = None) -> Tensor:
        """x [T, d] → [T, d]; `keep`: per stretch int64 [2, s], the crops that run attention and feed-forward."""
        if keep is None:
            x = x + self._attention(x, shapes)
            return x + self._feed_forward(x)
        for branch in (0, 1):
            rows = [k[branch] for k in keep]
            tokens, kept = kept_tokens(rows, shapes)
            part = x.index_select(0, tokens)
            out = self._attention(part, kept) if branch == 0 else self._feed_forward(part)
            scales = [n / max(s, 1) for (n, _), (s, _) in zip(shapes, kept, strict=True)]
            lengths = [s * t for s, t in kept]
            out = torch.cat([o * scale for o, scale in zip(out.split(lengths), scales, strict=True)])
            x = x.index_add(0, tokens, out.to(x.dtype))
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


def kept_tokens(rows: Sequence[Tensor], shapes: Shapes) -> tuple[Tensor, Shapes]:
    """Positions in the packed matrix of the tokens of the given crops (int64 [s] per stretch), and their shapes."""
    tokens, kept, start = [], [], 0
    for chosen, (n, t) in zip(rows, shapes, strict=True):
        offsets = torch.arange(t, device=chosen.device)
        tokens.append((start + chosen[:, None] * t + offsets).flatten())
        kept.append((chosen.shape[0], t))
        start += n * t
    return torch.cat(tokens), kept


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
        for i, block in enumerate(self.blocks):
            x = block(x, shapes, None if keep is None else [k[i] for k in keep])
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
