"""Whether a host can run its part of a job, by what `launch.probe` has found there: a finding for each thing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.job import Job
from scaler.doctor.finding import Finding, sized
from scaler.doctor.needs import Needs

_FILES = 4096  # open files that a process with its loader and hundreds of shards may come to
_SPARE_BYTES = 2**30  # on a disk for checkpoints of unknown size
_SHARED_BYTES = 2**30  # of /dev/shm for loaders of unknown size; Docker gives 64 MiB


def judge(name: str, facts: dict[str, Any], *, job: Job, needs: Needs, any_gpus: bool) -> Iterator[Finding]:
    """What is wrong with a host by itself, and what is right.

    Args:
        name: of the host.
        facts: what `launch.probe` found there.
        job: what is to run there and on others.
        needs: what will be asked of each of them.
        any_gpus: whether any of them has GPUs, and so all must.
    """
    error, warning, ok = (partial(Finding, level, host=name) for level in ("error", "warning", "ok"))
    if "listener" not in facts:
        yield error("folder", f"{os.getcwd()}: {facts['folder']}", "run this where every host has the same folder")
        return
    reason = facts["index"].get("error")
    if reason == "No such file or directory":
        fix = "copy the shards, or share the folder"
        yield error("shards", f"data.shards: no {needs.shards}/index.json there", fix)
    elif reason is not None:
        fix = f"chmod -R a+rX {needs.shards}, as who owns it"
        yield error("shards", f"data.shards: cannot read {needs.shards}/index.json: {reason}", fix)
    for place in facts["written"]:
        yield _disk(name, place, needs=needs)
    if facts["port"] is not None:
        fix = f"end what listens there (ss -ltnp sport = :{job.port}), or choose another with --port"
        yield error("port", f"port {job.port}: {facts['port']}", fix)
    if any_gpus and facts["gpus"] < job.processes:
        fix = "lower --processes or its slots"
        yield error("GPU", f"{facts['gpus']} GPUs for {job.processes} processes", fix)
    yield from _network(name, facts, job=job)
    yield _shared_memory(name, facts["shm"], needs=needs)
    if facts["files"] < _FILES:
        yield warning("open files", f"a process may open {facts['files']} files (ulimit -n)", "ulimit -n 65536")
    if needs.loader_processes > facts["cores"]:
        found = f"{needs.loader_processes} loader processes on {facts['cores']} cores"
        yield warning("cores", found, f"data.num_workers={max(1, facts['cores'] // job.processes)}")
    else:
        found = f"{facts['cores']} cores, {facts['files']} open files a process"
        yield ok("cores", found, facts={"cores": facts["cores"]})


def _disk(name: str, place: dict[str, Any], *, needs: Needs) -> Finding:
    """Whether a folder can be written, how fast, and whether there is room for the checkpoints."""
    folder, space = place["folder"], place["space"] or {"free": 0, "total": 0}
    finding = partial(Finding, check="disk", host=name, facts={"folder": folder, **space})
    if place["error"] == "No space left on device":
        fix = f"free some (du -xh {folder} | sort -h | tail), or change run.dir"
        return finding(level="error", found=f"cannot write to {folder}: {place['error']}", fix=fix)
    if place["error"] is not None:
        found = f"cannot write to {folder}: {place['error']}"
        return finding(level="error", found=found, fix="change run.dir or its rights")
    megabytes = place["bytes"] / 1e6 / place["seconds"]
    found = f"{folder}: {sized(space['free'])} free, written with {megabytes:.0f} MB/s"
    fix = "free some, put them elsewhere (checkpoint.dir), or keep fewer (checkpoint.keep_last=1)"
    if needs.checkpoint_bytes and _existing(needs.checkpoints) == folder:
        further = max(1, needs.num_checkpoints - place["checkpoints"])  # those that are there will make room
        found += f"; {further} checkpoints of {sized(needs.checkpoint_bytes)} are to come"
        if space["free"] < further * needs.checkpoint_bytes:
            return finding(level="error", found=found, fix=fix)
    elif space["free"] < _SPARE_BYTES:
        return finding(level="warning", found=found, fix=fix)
    return finding(level="ok", found=found)


def _shared_memory(name: str, space: dict[str, int] | None, *, needs: Needs) -> Finding:
    """Whether /dev/shm holds what loader processes hand over in it; where it does not, they die of SIGBUS."""
    finding = partial(Finding, check="/dev/shm", host=name, facts=space or {})
    wanted = needs.loader_bytes or _SHARED_BYTES
    fix = (
        f"docker run --shm-size={-(-wanted // 2**30)}g (compose: shm_size; Kubernetes: an emptyDir of medium Memory at "
        f"/dev/shm); elsewhere mount -o remount,size={-(-wanted // 2**30)}G /dev/shm; or lower data.num_workers"
    )
    if space is None:
        return finding(level="error", found="there is none, and loader processes hand over images in it", fix=fix)
    found = f"{sized(space['free'])} of {sized(space['total'])} free"
    if needs.loader_bytes:
        found += f"; {needs.loader_processes} loader processes take up to {sized(needs.loader_bytes)}"
    if space["free"] >= wanted:
        return finding(level="ok", found=found)
    return finding(level="error" if needs.loader_bytes else "warning", found=found, fix=fix)


def _network(name: str, facts: dict[str, Any], *, job: Job) -> Iterator[Finding]:
    """Whether the interfaces that gloo and NCCL would take exist and can be reached from elsewhere."""
    network, several = facts["network"], job.nodes > 1
    usable = real(network["interfaces"])
    shown = ", ".join(f"{interface} ({address})" for interface, address in usable.items()) or "none with an address"
    better = next(iter(usable), "INTERFACE")
    set_it = "--env" if job.hosts else "export"
    error = partial(Finding, "error", "network", host=name)
    if missing := [interface for interface in network["gloo"] if interface not in network["interfaces"]]:
        yield error(
            f"GLOO_SOCKET_IFNAME names {missing[0]}, which it does not have; there is {shown}",
            f"{set_it} GLOO_SOCKET_IFNAME={better}",
        )
    elif several and (network["offered"] or "").startswith("127."):
        why = f"GLOO_SOCKET_IFNAME={network['gloo'][0]}" if network["gloo"] else "its own name"
        mend = "" if network["gloo"] else ", or mend /etc/hosts there"
        yield error(
            f"{why} means loopback, which gloo would offer to the others, who hang",
            f"add {set_it} GLOO_SOCKET_IFNAME={better}{mend}",
        )
    elif facts["gpus"] and not nccl_finds(network["nccl"], network["interfaces"]):
        yield error(
            f"NCCL_SOCKET_IFNAME={network['nccl']} fits no interface; there is {shown}",
            f"{set_it} NCCL_SOCKET_IFNAME={better}",
        )
    else:
        yield Finding("ok", "network", f"{shown}; gloo offers {network['offered']}", host=name)


def real(interfaces: dict[str, str | None]) -> dict[str, str]:
    """Those with an address that others can reach."""
    return {name: address for name, address in interfaces.items() if address and not address.startswith("127.")}


def nccl_finds(pattern: str, interfaces: Iterable[str]) -> bool:
    """NCCL's rule: beginnings of names, `=` before them for whole names, `^` for all others; nothing for any."""
    exact, without = pattern.lstrip("^").startswith("="), pattern.startswith("^")
    words = [word for word in pattern.lstrip("^=").split(",") if word]

    def fits(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return not words or any(fits(name) != without for name in interfaces)


def _existing(path: str | None) -> str | None:
    """The nearest folder that exists at or above `path`, as the probe finds it."""
    if path is None:
        return None
    place = Path(path).absolute()
    while not os.path.isdir(place):
        place = place.parent
    return str(place)
