"""What loader workers deliver, how many a step takes, and whether decoding on the GPU pays, by measured rates.

`scaler bench feed`, the run log's advice (`scaler.throughput`) and `scaler doctor` all ask here, so that they agree.

    one = {1: 410.0}                                     # images/s of one worker; or of several numbers of workers
    workers_needed(950.0, one)                           # 3
    delivered(worker_room(4), one)                       # images/s on 4 cores: 1230.0
    gpu_decoding_pays(950.0, by_cpu=410.0, by_gpu=2400.0, device_seconds=1e-4)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

HEADROOM = 1.1  # a loader that is only just as fast as the step leaves it waiting whenever a batch is late


def worker_room(cores: int, *, processes: int = 1) -> int:
    """How many workers of each training process on a machine have a core of their own, beside the process itself; at
    least one."""
    return max(1, cores // processes - 1)


def delivered(num_workers: int, measured: Mapping[int, float]) -> float:
    """Images/s of so many workers, by those that were measured {workers: images/s}: between two measured numbers on the
    line between them, beyond the last in proportion to it. No workers are the training process itself, as one."""
    points = [(0, 0.0), *sorted(measured.items())]
    wanted = max(num_workers, 1)
    for (w, low), (v, high) in itertools.pairwise(points):
        if wanted <= v:
            return low + (high - low) * (wanted - w) / (v - w)
    last, rate = points[-1]
    return rate * wanted / last


def workers_needed(wanted: float, measured: Mapping[int, float], *, headroom: float = HEADROOM) -> int:
    """The smallest number of workers that deliver `wanted` images/s `headroom` times, by `delivered`; at least one."""
    target = wanted * headroom
    if target <= 0:
        return 1
    points = [(0, 0.0), *sorted(measured.items())]
    for (w, low), (v, high) in itertools.pairwise(points):
        if high >= target:
            return max(1, math.ceil(w + (v - w) * (target - low) / (high - low)))
    last, rate = points[-1]
    return math.ceil(last * target / max(rate, 1e-9))


def fed(wanted: float, *, by_workers: float, device_seconds: float = 0.0) -> float:
    """Images/s of a step that would make `wanted` of them if it never waited, fed by workers that deliver `by_workers`.

    `device_seconds` an image the device spends on decoding and cutting, which the step is charged in full: what runs
    beside it may cost it less, never more.
    """
    return min(1.0 / (1.0 / wanted + device_seconds), by_workers)


def gpu_decoding_pays(wanted: float, *, by_cpu: float, by_gpu: float, device_seconds: float) -> bool:
    """Whether a step trains faster with pictures decoded on the GPU.

    It does when the workers at hand cannot decode what the step wants, and decoding and cutting cost the device less
    time than the step would wait for them.

    Args:
        wanted: images/s of the step when it never waits.
        by_cpu: images/s that the workers deliver decoded and cut.
        by_gpu: images/s that the same workers deliver for the GPU to decode.
        device_seconds: of the GPU for an image: decoding and cutting.
    """
    if by_cpu >= wanted:
        return False
    return fed(wanted, by_workers=by_gpu, device_seconds=device_seconds) > fed(wanted, by_workers=by_cpu)
