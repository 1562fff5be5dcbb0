"""Where the host waits for the device, by a trace of torch's profiler.

    with profile(activities=[…]) as profiler, counted():
        training_step(…)
    host_syncs(profiler.events())           # {"item at scaler/loop.py:214": 1}

On a GPU these are the driver's own calls that return only when the device is so far. On a CPU nothing waits, and what
would is what reads a tensor's values into Python; a tensor that a GPU's run keeps on the host is read there by way of
numpy, which is not counted. (Reads inside of torch's operations are not counted there either: the kernels are others.)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

_READS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")
_RANGE, _MARK = "host_syncs_counted", "host_sync: "
_WAITS = re.compile(
    r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy(2D|ToSymbol|FromSymbol)?|cu(Stream|Ctx|Event)Synchronize|"
    r"aten::(is_nonzero|equal)"
)
_OWN = Path(__file__).parents[1]


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """What `host_syncs` counts: inside, Python's reads of tensors leave a mark in the profile that says where."""
    with contextlib.ExitStack() as stack:
        for name in _READS:
            own = Tensor.__dict__.get(name)
            stack.callback(functools.partial(delattr, Tensor, name) if own is None else _setter(name, own))
            setattr(Tensor, name, _marking(name, getattr(Tensor, name)))
        with record_function(_RANGE):
            yield


def _setter(name: str, function: Any) -> Callable[[], None]:
    return lambda: setattr(Tensor, name, function)


def _marking(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def marked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{_MARK}{name.strip('_')} at {_place()}"):
            return read(tensor, *args, **kwargs)

    return marked


def _place() -> str:
    """The innermost line of ours that is being executed, else the caller's."""
    stack = traceback.extract_stack()[:-2]
    own = [frame for frame in stack if frame.filename.startswith(f"{_OWN}/") and frame.filename != __file__]
    frame = (own or stack)[-1]
    return f"{frame.filename.removeprefix(f'{_OWN.parent}/')}:{frame.lineno}"


def host_syncs(events: Iterable[Any]) -> Counter[str]:
    """How often the host waited within `counted`, by what made it: Python's line, or else the operations around it.

    Args:
        events: of the profiler (`profiler.events()`).
    """
    mine = [e for e in events if e.device_type.name == "CPU"]
    ranges = [e.time_range for e in mine if e.name == _RANGE]
    waits = [e for e in mine if e.name.startswith(_MARK) or _WAITS.fullmatch(e.name)]
    found: Counter[str] = Counter()
    until = float("-inf")
    for event in sorted(waits, key=lambda e: (e.time_range.start, -e.time_range.end)):
        start, end = event.time_range.start, event.time_range.end
        if end <= until or not any(r.start <= start and end <= r.end for r in ranges):
            continue  # a part of the wait before it, or not to be counted
        until = end
        if event.name.startswith(_MARK):
            found[event.name.removeprefix(_MARK)] += 1
        else:
            around = (name for name in _around(event) if name != _RANGE)
            found[" in ".join([event.name, *itertools.islice(around, 2)])] += 1
    return found


def _around(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def pageable_copies(events: Iterable[Any]) -> int:
    """Copies between the GPU and memory that is not pinned, for which the driver may keep the host waiting."""
    return sum("Memcpy" in e.name and "Pageable" in e.name for e in events)


def as_line(found: Mapping[str, int], *, device: torch.device) -> str:
    """What `host_syncs` found, in words."""
    cuda = device.type == "cuda"
    if not found:
        return "the host never waits for the GPU" if cuda else "the host would never wait for a GPU"
    places = ", ".join(place + f" ({count} times)" * (count > 1) for place, count in Counter(found).most_common())
    verb = "waits for the GPU" if cuda else "would wait for a GPU"
    return f"the host {verb} {sum(found.values())} times: {places}"
