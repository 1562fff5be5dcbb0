"""How a method's blocks run: what they keep for their backward, and what of them is compiled.

Activation checkpointing of a ViT's block: bytes, and operations to compute them again, per token (width d, bf16,
t tokens in a crop):

    fc2                             2d bytes, 8 d²            4d operations a byte
    attention                       2d bytes, 4 t d           2t, by kernels of half the speed
    qkv, proj, fc1                  16d bytes, 16 d²          d
    norms, casts, GELU, scale, sum  18d bytes, bandwidth      about 0

`selective` keeps what costs time, the outputs of matrix products, convolutions and attention, and computes the last
line again: 40 % of the memory for a few per cent of the time. `blocks` keeps a block's input alone, the
least memory, for one more forward (a third of the time).

Compilation: all blocks of a kind (class, shapes, trained or not) share one compiled function of (block, inputs), whose
graph covers the block's whole forward, checkpointing included; what strategies hook on a block stays outside of it.
So N blocks are compiled once. (`Module.compile` shares one code object among all modules: behind a checkpoint dynamo
compiled none of a depth of 24, and said nothing.)
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Forward = Callable[..., Any]  # of a block and its inputs

# Those of them that torch has, by its version and build. `bmm` is not here: it is attention written out, [t, t] a head.
_DEAR = (
    "mm",
    "addmm",
    "_scaled_mm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = frozenset(getattr(torch.ops.aten, name).default for name in _DEAR if hasattr(torch.ops.aten, name))


def arrange_blocks_(
    blocks: Sequence[nn.Module], *, checkpointing: str | int, compiled: bool = False, backend: str = "inductor"
) -> None:
    """Give the blocks the forward that the settings ask for; parameters, names and hooks stay as they are.

    Args:
        blocks: of a method, those that are trained first.
        checkpointing: "none", "selective", "blocks", or how many of the first blocks forget what is inside them.
        compiled: whether they are compiled, when they are first called.
        backend: of torch.compile.
    """
    wanted = checkpointing if isinstance(checkpointing, int) else 0 if checkpointing == "none" else len(blocks)
    kinds: dict[Any, Forward] = {}
    for number, block in enumerate(blocks):
        trained = any(p.requires_grad for p in block.parameters())
        forward = type(block).forward
        if number < wanted and trained:
            forward = _checkpointed(forward, selective=checkpointing == "selective")
        elif not compiled:
            continue
        if compiled:
            kind = (
                type(block),
                number < wanted and trained,
                *((n, p.shape, p.requires_grad) for n, p in block.named_parameters()),
            )
            forward = kinds.setdefault(kind, CompiledForward(forward, name=type(block).__name__, backend=backend))
        block.forward = types.MethodType(forward, block)


def _checkpointed(forward: Forward, *, selective: bool) -> Forward:
    """`forward`, of whose intermediate values nothing, or only what is dear, waits for the backward."""
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # as of torch 2.13 or so
            options["respect_saved_tensors_hooks"] = True

    def run(block: nn.Module, *args: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, **options)

    return run


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What becomes of an operation's output: see the table above."""
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class CompiledForward:
    """A forward of blocks, compiled as one graph for every kind of input: fixed shapes, with and without gradient.

    Where that cannot be, it says so once and runs on: in the pieces that can be compiled where something in the block
    (a hook) cannot, uncompiled where that block keeps statistics, and uncompiled beyond as many kinds of input as
    dynamo keeps apart.
    """

    def __init__(self, forward: Forward, *, name: str, backend: str) -> None:
        import torch._dynamo  # takes seconds, and most processes compile nothing

        self._forward, self._name, self._backend = forward, name, backend
        self._run = self._compile(whole=True)
        # Else dynamo cuts graphs at the borders of DDP's buckets, which are for models that are compiled as a whole.
        self._whole_under_ddp = torch._dynamo.config.patch(optimize_ddp=False)

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """The block's output; under a dispatch mode, which looks at every operation, from the operations themselves."""
        if is_in_torch_dispatch_mode(include_infra_modes=False):
            return self._forward(block, *args)
        try:
            with self._whole_under_ddp:
                return self._run(block, *args)
        except torch._dynamo.exc.Unsupported as error:
            why = str(error).strip().splitlines()[0]
            # Pieces do not know that they are computed again for a backward, and would count a batch twice.
            counts = any(True for _ in block.buffers())
            outcome = "is not compiled" if counts else "is compiled in pieces, which saves less time"
            warnings.warn(
                f"{self._name} cannot be compiled as a whole ({why}): it {outcome}; TORCH_LOGS=graph_breaks says where",
                stacklevel=2,
            )
            self._run = self._forward if counts else self._compile(whole=False)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            warnings.warn(
                f"{self._name} has met more than {torch._dynamo.config.recompile_limit} kinds of input (image or "
                "batch sizes), and is no longer compiled; use fewer of them, or set strategy.compile=false; "
                "TORCH_LOGS=recompiles says what they are",
                stacklevel=2,
            )
            self._run = self._forward
        return self(block, *args)

    def _compile(self, *, whole: bool) -> Forward:
        # A code object of its own: dynamo counts what it has compiled by code object.
        own = types.FunctionType(
            self._forward.__code__.replace(),
            self._forward.__globals__,
            self._forward.__name__,
            self._forward.__defaults__,
            self._forward.__closure__,
        )
        own.__kwdefaults__ = self._forward.__kwdefaults__
        compiled: Forward = torch.compile(own, backend=self._backend, fullgraph=whole, dynamic=False)
        return compiled
