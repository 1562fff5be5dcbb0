"""What a run makes of its machine: memory, its growth, and how busy the GPUs are.

machine = MachineMeter(device, num_gpus=8)
row |= machine.read()
machine.close()
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import psutil
import torch

_INTERVAL = 1.0  # seconds between samples; NVML itself looks back over the last sixth of a second to one second
_WARM = 10  # readings until memory is expected to stay as it is


class MachineMeter:
    """Memory and utilisation between two readings; a thread samples the GPUs beside the training.

    Args:
        device: this process's.
        num_gpus: of this machine, that the run uses.
        utilization: percent of GPU i; None: NVML's.

    Attributes:
        problem: why utilisation cannot be measured, if it cannot; None on a CPU, too.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_gpus: int = 1,
        utilization: Callable[[int], float] | None = None,
        interval: float = _INTERVAL,
    ) -> None:
        self._device, self._process = device, psutil.Process()
        self._gpus = range(num_gpus) if device.type == "cuda" or utilization is not None else range(0)
        self._utilization, self._interval = utilization or torch.cuda.utilization, interval
        self._samples: list[float] = []
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._readings, self._first = 0, 0.0
        self._host, self._host_at = 0.0, -math.inf  # GiB, and when that was measured
        self.problem: str | None = None
        self._sample()  # here, so that what is missing is known before the first step
        if self._gpus and self.problem is None:
            self._thread = threading.Thread(target=self._watch, name="machine-meter", daemon=True)
            self._thread.start()

    def read(self) -> dict[str, float]:
        """Since the last reading: `memory_gib` (see `memory_gib`), `memory_growth_gib` (since the tenth reading, from
        there on), `host_memory_gib` (this process and its loader's workers; pages that they share count for each; at
        most `interval` old, since it means a look at all processes of the machine, milliseconds of a short step), and
        with GPUs `gpu_utilization`, the mean of them, 0 to 1."""
        memory = memory_gib(self._device)
        row = {"memory_gib": memory, "host_memory_gib": self._host_memory()}
        self._readings += 1
        if self._readings == _WARM:
            self._first = memory
        if self._readings >= _WARM:
            row["memory_growth_gib"] = memory - self._first
        with self._lock:
            samples, self._samples = self._samples, []
        if samples:
            row["gpu_utilization"] = sum(samples) / len(samples) / 100
        return row

    def close(self) -> None:
        """End the sampling; calling it again does nothing."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _host_memory(self) -> float:
        now, total = time.monotonic(), 0
        if now - self._host_at < self._interval:
            return self._host
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue
        self._host, self._host_at = total / 2**30, now
        return self._host

    def _watch(self) -> None:
        while not self._end.wait(self._interval) and self.problem is None:
            self._sample()

    def _sample(self) -> None:
        if not self._gpus:
            return
        try:
            value = sum(self._utilization(gpu) for gpu in self._gpus) / len(self._gpus)
        except Exception as error:  # NVML is missing, too old, or does not know such a device (a slice of one)
            self.problem = f"{type(error).__name__}: {error}"
            return
        with self._lock:
            self._samples.append(value)


def memory_gib(device: torch.device | str) -> float:
    """Peak memory allocated on a CUDA device, or this process's resident memory on the CPU, in GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
