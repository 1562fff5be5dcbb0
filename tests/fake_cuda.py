"""A GPU that is not there: steps run on fake CUDA tensors, and what would make the host wait for the device is noted.

    with fake_cuda(monkeypatch) as gpu:
        ...                                   # tensors on "cuda" have shapes, dtypes and devices, but no values
    assert gpu.waits == []

Tensors on the CPU are real. torch's fake tensors do the rest, except for two things that want a real device: autocast,
which switches itself off without one, and autograd's engine, which has a thread for each GPU. The first is told that
there is one; in the second's place the recorded graph is walked here, node by node, by the same formulas.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import scaler

_OWN = str(Path(scaler.__file__).parent)
_ATEN = torch.ops.aten

# Operations that copy something to the host, or learn there how large their result is.
_READS = {_ATEN._local_scalar_dense, _ATEN.equal, _ATEN.is_nonzero, _ATEN.allclose, _ATEN.multinomial}
_SIZED = {
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN._unique,
    _ATEN._unique2,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN.bincount,
    _ATEN.repeat_interleave,
}


class FakeCuda(TorchDispatchMode):
    """Notes in `waits` every operation that waits for the device, as "file:line operation", and in `own` the names of
    our own operators, behind which are kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.own: set[str] = set()
        self._pinned: dict[int, Tensor] = {}  # by address, and kept, so that no other tensor gets it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        wanted = kwargs.get("device")
        op = func._overloadpacket
        if func.namespace == "scaler":
            self.own.add(op._qualified_op_name)
        if op is _ATEN._pin_memory:
            with _disable_current_modes():
                copy = args[0].clone()
            self._pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if op is _ATEN._fused_sgd_:  # in place, and the only one that torch has no fake form of
            return None
        if kwargs.get("pin_memory"):
            with _disable_current_modes():
                made = func(*args, **{**kwargs, "pin_memory": False})
            self._pinned[made.untyped_storage().data_ptr()] = made
            return made
        if not on_gpu and (wanted is None or torch.device(wanted).type != "cuda"):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if op is _ATEN._local_scalar_dense:
            self._note(func)
            return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if op in _READS or (op in _SIZED and kwargs.get("output_size") is None):
            self._note(func)
        if op is _ATEN._to_copy and on_gpu and wanted is not None and torch.device(wanted).type == "cpu":
            self._note(func)  # also without blocking: what comes is not there yet when it is read
            with _disable_current_modes():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if op is _ATEN._to_copy and not on_gpu:
            self._from_host(func, args[0], bool(kwargs.get("non_blocking")))
        if op is _ATEN.copy_ and (len(args) < 2 or isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor)):
            if isinstance(args[0], FakeTensor):
                self._from_host(func, args[1], len(args) > 2 and bool(args[2]))
            else:
                self._note(func)
                return args[0]
        if op in (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_):
            for index in args[1]:
                if isinstance(index, Tensor) and (
                    index.dtype in (torch.bool, torch.uint8) or not isinstance(index, FakeTensor)
                ):
                    self._note(func)
        return func(*args, **kwargs)

    def _from_host(self, func: Any, source: Tensor, non_blocking: bool) -> None:
        if source.numel() and not (non_blocking and source.untyped_storage().data_ptr() in self._pinned):
            self._note(func)

    def _note(self, func: Any) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_OWN)]
        where = f"{own[-1].filename.removeprefix(_OWN + '/')}:{own[-1].lineno}" if own else "elsewhere"
        self.waits.append(f"{where} {func}")


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Inside, `device="cuda"` is a device whose tensors are fake."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 0)  # activation checkpointing recomputes once a walk
        with FakeTensorMode(allow_non_fake_inputs=True), FakeCuda() as gpu:
            yield gpu


def to_fake_cuda(module: torch.nn.Module) -> None:
    """Give a module (whose parameters may be on "meta") fake parameters and buffers on the GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def fake_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """A loader's batch with its views on the GPU."""
    views = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in batch["views"].items()}
    return {**batch, "views": views}


def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    allow_unreachable: bool,
    accumulate_grad: bool,
) -> tuple[Tensor | None, ...]:
    """In autograd's engine's place: walk the graph behind `outputs`, and add to `.grad` or return that of `inputs`."""
    wanted = {_node(x): number for number, x in enumerate(inputs)}
    roots = [_node(x) for x in outputs]
    edges: Counter[Any] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None:
                edges[after] += 1
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
    arrived: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in seen}
    for x, node, gradient in zip(outputs, roots, gradients, strict=True):
        arrived[node][x.output_nr] = torch.ones_like(x) if gradient is None else gradient
    results: list[Tensor | None] = [None] * len(inputs)
    ready = [node for node in roots if not edges[node]]
    with torch.set_grad_enabled(create_graph):
        while ready:
            node = ready.pop()
            came = arrived.pop(node)
            if node in wanted and not accumulate_grad:
                results[wanted[node]] = came[0]
            if hasattr(node, "variable"):
                if accumulate_grad and came[0] is not None:
                    variable = node.variable
                    variable.grad = came[0].detach() if variable.grad is None else variable.grad + came[0]
                continue
            out: Any = [None] * len(node.next_functions)
            if any(gradient is not None for gradient in came):
                out = (node.apply if hasattr(node, "apply") else node)(*came)
                out = out if isinstance(out, tuple) else (out,)
            for (after, slot), gradient in zip(node.next_functions, out, strict=False):
                if after is None:
                    continue
                if gradient is not None:
                    like = after._input_metadata[slot]
                    gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                    before = arrived[after][slot]
                    arrived[after][slot] = gradient if before is None else before + gradient
                edges[after] -= 1
                if not edges[after]:
                    ready.append(after)
    return tuple(results)


def _node(x: Tensor) -> Any:
    return x.grad_fn if x.grad_fn is not None else torch.autograd.graph.get_gradient_edge(x).node
