"""One step under torch's profiler: what the device did, how long it was idle, and what made the host wait.

A profiled step is slower on the host than others, so the idle share is an upper bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scaler.bench.syncs import as_line, counted, host_syncs, pageable_copies

# Kinds of work by the names of kernels, or on a CPU of torch's operations; the first that fits.
_KINDS = {
    "collectives": r"nccl|gloo:|c10d::",
    "compiled": r"^triton_(?!tem)",
    "attention": r"flash|fmha|attention|sdp",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|mm_?$|linear$|triton_tem|addmv|conv|mkldnn",
    "optimiser and EMA": r"multi_tensor|adam|_foreach|_fused_sgd|lerp",
    "copies": r"memcpy|memset|copy|cat|index|gather|scatter|fill|zero",
    "softmax and norms": r"softmax|norm|reduce|::sum|amax|argmax",
    "element by element": r"elementwise|vectorized|unrolled|aten::",
}


def profile_step(step: Callable[[], Any], device: torch.device, *, file: Path | None = None) -> dict[str, Any]:
    """Profile the second of two steps.

    Args:
        step: runs one; a GPU may still be at it when it returns.
        device: of the step.
        file: for the chrome trace, compressed if its name ends with .gz.

    Returns:
        `seconds_by_kind` of kernels (on a CPU of operations, without those that they call), `collective_seconds` (next
        to other work, so no part of the step's time), `idle` share of the GPU between its first kernel and its last
        (None on a CPU), `kernels`, how many; `host_syncs`, how often the host waited, by what made it (see
        `scaler.bench.syncs`), `pageable_copies`, that may keep it waiting, and `waiting`, the first in words.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):  # the first time the profiler sets itself up
        with profile(activities=activities) as profiler:
            with counted():
                step()
            if cuda:
                torch.cuda.synchronize(device)
    if file is not None:
        profiler.export_chrome_trace(str(file))
    events = list(profiler.events() or ())
    waits = host_syncs(events)
    seconds: Counter[str] = Counter()
    if cuda:
        on_gpu = (e for e in events if e.device_type.name == "CUDA")
        kernels = [e for e in on_gpu if not getattr(e, "is_user_annotation", False)]
        spans = [(e.time_range.start, e.time_range.end) for e in kernels]
        for event in kernels:
            seconds[kind(event.name)] += event.time_range.elapsed_us() / 1e6
        collectives = seconds["collectives"]
    else:
        kernels = [e for e in events if e.name.startswith("aten::")]
        spans = []
        for event in kernels:
            seconds[kind(event.name)] += event.self_cpu_time_total / 1e6
        collectives = sum(e.time_range.elapsed_us() / 1e6 for e in events if e.name.startswith("gloo:"))
    return {
        "seconds_by_kind": dict(seconds.most_common()),
        "collective_seconds": collectives,
        "idle": idle_share(spans) if spans else None,
        "kernels": len(kernels),
        "host_syncs": dict(waits),
        "pageable_copies": pageable_copies(events),
        "waiting": as_line(waits, device=device),
    }


def kind(name: str) -> str:
    """Of a kernel or an operation, by its name."""
    for found, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return "other"


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first beginning to the last end in which none of the spans runs."""
    ordered = sorted(spans)
    first, until, busy = ordered[0][0], ordered[0][0], 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / max(until - first, 1e-9)


def as_lines(profiled: Mapping[str, Any], *, file: str | None) -> Iterator[str]:
    """What `profile_step` found, in words."""
    kinds = profiled["seconds_by_kind"]
    total = sum(kinds.values())
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in kinds.items() if seconds)
    idle = "" if profiled["idle"] is None else f"; the GPU is idle for at most {100 * profiled['idle']:.1f} %"
    yield f"one profiled step: {profiled['kernels']} kernels or operations: {shares}{idle}"
    yield f"in it {profiled['waiting']}"
    if profiled["collective_seconds"]:
        yield f"collectives: {1000 * profiled['collective_seconds']:.1f} ms of a step, beside other work or waiting"
    if file is not None:
        yield f"its trace: {file} (https://ui.perfetto.dev shows it)"
