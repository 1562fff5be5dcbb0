"""A ViT's weights by the names of the original DINOv2 (github.com/facebookresearch/dinov2), in one file of torch's.

Positions, registers and SwiGLU are laid out as there: the class token's position stands first in `pos_embed`, registers
have none. `forward` computes what the original computes from such a file. It is written from the names alone and
shares no line with the models here, so a file that passes is right for whoever reads those names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scaler.export.encoder import Encoder

_KNOWN = re.compile(
    r"cls_token|pos_embed|mask_token|register_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|ls[12]\.gamma"
    r"|mlp\.(fc1|fc2|w12|w3)\.(weight|bias))"
)
_EPSILON = 1e-6  # of its norms


def write(encoder: Encoder, place: Path, *, dynamic_size: bool) -> None:
    """Write the file; the original resizes positions itself, whether or not other sizes are asked for.

    Raises:
        ValueError: not a model that the original has.
    """
    if encoder.patch_size is None:
        raise ValueError(
            f"the original DINOv2 has plain ViTs only, and {encoder.architecture} is none: export it with --format timm"
        )
    if encoder.num_classes:
        raise ValueError("the original DINOv2 keeps no classifier: leave out --classifier, or take --format timm")
    num_positions = 0 if encoder.model_args["no_embed_class"] else 1 + encoder.model_args["reg_tokens"]
    state = original_names(encoder.model.state_dict(), num_positions=num_positions)
    unknown = next((name for name in state if not _KNOWN.fullmatch(name)), None)
    if unknown or "pos_embed" not in state:
        what = f"no {unknown}, which {encoder.architecture} has" if unknown else "learned positions"
        raise ValueError(f"the original DINOv2 has {what}: export it with --format timm")
    torch.save(state, place)


def original_names(state: Mapping[str, Tensor], *, num_positions: int) -> dict[str, Tensor]:
    """The state of a timm ViT as the original lays it out.

    Args:
        num_positions: how many tokens before the patches have a position in `pos_embed` [1, num_positions + p, d].
    """
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    cls, registers, positions = state["cls_token"], state.pop("reg_token", None), state.get("pos_embed")
    if positions is not None:
        before, grid = positions[:, :num_positions], positions[:, num_positions:]
        if registers is not None and num_positions > 1:  # a register's position becomes part of it
            registers = registers + before[:, 1:]
        first = before[:, :1] if num_positions else torch.zeros_like(cls)
        state["pos_embed"] = torch.cat([first, grid], dim=1)
    if registers is not None:
        state["register_tokens"] = registers
    state.setdefault("mask_token", cls.new_zeros(1, cls.shape[-1]))  # which the original always has
    for name in [name for name in state if name.endswith("mlp.fc1.weight")]:
        mlp = name.removesuffix("fc1.weight")
        if state[name].shape[0] != state[f"{mlp}fc2.weight"].shape[1]:  # SwiGLU: gates and values in one matrix
            for kind in ("weight", "bias"):
                state[f"{mlp}w12.{kind}"], state[f"{mlp}w3.{kind}"] = (
                    state.pop(f"{mlp}{layer}.{kind}") for layer in ("fc1", "fc2")
                )
    return state


def read(place: Path, encoder: Encoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What the original computes from the file."""
    state = torch.load(place, map_location="cpu", weights_only=True)
    return partial(forward, state, num_heads=encoder.model_args["num_heads"])


@torch.no_grad()
def forward(state: Mapping[str, Tensor], images: Tensor, *, num_heads: int) -> tuple[Tensor, Tensor]:
    """The original's features [n, d] and patch features [n, p, d] of images [n, 3, h, w], as many as it has positions
    for; attention in full, nothing fused.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], _EPSILON)

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state.get("patch_embed.proj.bias"), stride=kernel.shape[-1]).flatten(2).mT
    n, _, d = x.shape
    x = torch.cat([state["cls_token"].expand(n, -1, -1), x], dim=1) + state["pos_embed"]
    registers = state.get("register_tokens", x.new_empty(1, 0, d))
    x = torch.cat([x[:, :1], registers.expand(n, -1, -1), x[:, 1:]], dim=1)
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [n, heads, tokens, d / heads] each
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        out = linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + out * state.get(f"{block}.ls1.gamma", 1.0)
        out = norm(f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in state:
            gate, values = linear(f"{block}.mlp.w12", out).chunk(2, dim=-1)
            out = linear(f"{block}.mlp.w3", F.silu(gate) * values)
        else:
            out = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", out)))
        x = x + out * state.get(f"{block}.ls2.gamma", 1.0)
    x = norm("norm", x)
    return x[:, 0], x[:, 1 + registers.shape[1] :]
