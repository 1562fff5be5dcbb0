"""The processes that a launcher has started: whether they meet, add up right, and how fast."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from scaler.doctor.finding import Finding, counted, first_line

_NUMBERS = (1 << 20) + 3  # added up to see whether the sums are right; no multiple of anything
_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # added up to see how fast
_SLOW = {"cpu": 0.1e9, "cuda": 5e9}  # bytes per second below which a training mostly waits
_CLOCK_SECONDS = 2.0


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """Meet, as a training does, and look at each other; on every process the findings of all.

    Args:
        asked: `findings` of this machine so far (on its first process; elsewhere none).
    """
    from scaler.strategies.processes import join, meet

    print("starting", file=sys.stderr, flush=True)
    try:
        meeting = meet(say=lambda text: print(text, file=sys.stderr, flush=True))
        print(f"joining {meeting.size} processes into a group", file=sys.stderr, flush=True)
        world, device = join(meeting, ranks=meeting.size, timeout_minutes=1)
        hosts = world.gather_objects(socket.gethostname())
        several = len(set(hosts)) > 1
        for host, findings in zip(hosts, world.gather_objects(asked["findings"]), strict=True):
            yield from (Finding(**{**finding, "host": host if several else ""}) for finding in findings)
        print("adding up", file=sys.stderr, flush=True)
        yield sums(world, device, hosts)
        yield _speed(world, device, several=several)
        if several:
            yield _clocks(world, hosts)
        world.barrier()  # the first process may hold the store by which the others hear
    except (ValueError, RuntimeError) as error:
        here = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        fix = "scaler doctor --hosts HOSTFILE looks at names, interfaces and ports; GLOO_SOCKET_IFNAME chooses one"
        yield Finding("error", "all-reduce", f"{here}: {first_line(error)}", fix)


def sums(world: Any, device: Any, hosts: list[str]) -> Finding:
    """Whole numbers, whose sums are exact in any order; every process knows what the others have."""
    import torch

    def numbers(rank: int) -> torch.Tensor:
        return torch.randint(-1000, 1000, (_NUMBERS,), generator=torch.Generator().manual_seed(rank)).float()

    total = world.sum_(numbers(world.rank).to(device)).cpu()
    wrong = int((total != sum(numbers(rank) for rank in range(world.size))).sum())
    counts = world.gather_objects(wrong)
    if any(counts):
        who = ", ".join(f"rank {r} ({hosts[r]}): {n} of {_NUMBERS}" for r, n in enumerate(counts) if n)
        fix = "NCCL_DEBUG=INFO says over what they go; try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the part"
        return Finding("error", "all-reduce", f"wrong sums on {who}", fix, facts={"wrong": counts})
    return Finding(
        "ok", "all-reduce", f"{world.size} processes on {counted(len(set(hosts)), 'machine')} add up exactly"
    )


def _speed(world: Any, device: Any, *, several: bool) -> Finding:
    """Bus bandwidth: bytes that cross each link in a second, 2 (n - 1) / n of the tensor's (as nccl-tests has it)."""
    import torch

    def seconds(tensor: torch.Tensor, rounds: int) -> float:
        for timed in (False, True):
            world.barrier()
            started = time.perf_counter()
            for _ in range(rounds if timed else 2):
                world.sum_(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return float(world.max_(torch.tensor((time.perf_counter() - started) / rounds, device=device)))

    number_bytes = _BYTES[device.type]
    latency = seconds(torch.zeros(1, device=device), 20)
    rate = 2 * (world.size - 1) / world.size * number_bytes / seconds(torch.zeros(number_bytes // 4, device=device), 5)
    facts = {"bytes_per_second": rate, "latency_seconds": latency}
    backend = "NCCL" if device.type == "cuda" else "gloo"
    found = f"{rate / 1e9:.2f} GB/s over {backend} (bus bandwidth at {number_bytes >> 20} MiB), {latency * 1e6:.0f} µs"
    if rate < _SLOW[device.type]:
        between = "the interface (NCCL_SOCKET_IFNAME), InfiniBand (ibstat)" if several else "nvidia-smi topo -m"
        return Finding("warning", "bandwidth", found, f"NCCL_DEBUG=INFO says over what it goes: {between}", facts=facts)
    return Finding("ok", "bandwidth", found, facts=facts)


def _clocks(world: Any, hosts: list[str]) -> Finding:
    """Clocks of all machines against the first, read when all have met."""
    world.barrier()
    times = world.gather_objects(time.time())
    apart = {host: seconds - times[0] for host, seconds in zip(hosts, times, strict=True)}
    host = max(apart, key=lambda name: abs(apart[name]))
    if abs(apart[host]) > _CLOCK_SECONDS:
        found = f"{host}'s clock is {apart[host]:+.1f} s from {hosts[0]}'s"
        return Finding("error", "clock", found, "run a time service (chrony) on both", facts=apart)
    return Finding("ok", "clock", f"all machines' within {_CLOCK_SECONDS:.0f} s of {hosts[0]}'s", facts=apart)
