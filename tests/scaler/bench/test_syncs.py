"""Waits of the host, found in a profile."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace as Of
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scaler.bench.syncs import as_line, counted, host_syncs, pageable_copies


def test_reads_into_python_are_counted_where_they_are_made():
    x = torch.arange(4.0)
    before = {name: torch.Tensor.__dict__.get(name) for name in ("item", "__bool__", "cpu")}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        x.sum().item()  # outside
        with counted():
            x.sum().item()
            if x[1] > 0:
                float(x[0])
            assert x.numpy().tolist() == x.tolist()
            torch.equal(x, x)
            [int(value) for value in x]
        x.tolist()
    found = host_syncs(profiler.events())
    kinds = {place.split(" at ")[0]: count for place, count in found.items()}
    assert kinds == {"item": 1, "bool": 1, "float": 1, "tolist": 1, "aten::equal": 1, "int": 4}
    assert all("test_syncs.py:" in place for place in found if " at " in place)
    assert before == {name: torch.Tensor.__dict__.get(name) for name in before}
    assert as_line(found, device=torch.device("cpu")).startswith("the host would wait for a GPU 9 times: int at ")


@dataclass
class Event:
    """What there is of a profiler's event."""

    name: str
    start: float
    end: float
    cpu_parent: Any = None
    device_type: Any = field(default_factory=lambda: Of(name="CPU"))

    @property
    def time_range(self) -> Any:
        return Of(start=self.start, end=self.end)


def test_what_the_driver_waits_for_is_told_with_what_called_it():
    inside = Event("host_syncs_counted", 0, 100)
    copy = Event("aten::copy_", 10, 20, Event("aten::to", 9, 21, inside))
    read = Event("host_sync: item at scaler/loop.py:7", 30, 40, inside)
    events = [
        inside,
        copy,
        Event("cudaMemcpyAsync", 11, 12, copy),
        Event("cudaStreamSynchronize", 12, 20, copy),
        read,
        Event("cudaStreamSynchronize", 31, 39, Event("aten::_local_scalar_dense", 30, 40, read)),
        Event("cudaLaunchKernel", 50, 51, inside),
        Event("cudaDeviceSynchronize", 101, 120),
        Event("Memcpy HtoD (Pageable -> Device)", 15, 16, device_type=Of(name="CUDA")),
        Event("Memcpy HtoD (Pinned -> Device)", 55, 56, device_type=Of(name="CUDA")),
    ]
    assert host_syncs(events) == {
        "cudaStreamSynchronize in aten::copy_ in aten::to": 1,
        "item at scaler/loop.py:7": 1,
    }
    assert pageable_copies(events) == 1
    assert as_line({}, device=torch.device("cuda")) == "the host never waits for the GPU"
