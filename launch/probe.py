"""What `launch.check` runs on each host: sent there as text, so it needs nothing but the standard library.

    python -c "$(cat launch/probe.py)" '{"number": 0, "folder": "/work", …}'

It answers each line of its standard input with one line of JSON: what it finds on its host by itself, what time it is,
and, once every host has come so far, what it sees of the others. It cleans up when standard input ends.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

_SIOCGIFADDR = 0x8915  # ask an interface for its IPv4 address
_SECONDS = 5.0  # for a connection to another host
_CHUNK = 1 << 20  # bytes written at a time


def main() -> None:
    """Answer until standard input ends."""
    asked = json.loads(sys.argv[1])
    with contextlib.ExitStack() as stack:
        for line in sys.stdin:
            question = json.loads(line)
            if question["about"] == "alone":
                answer = alone(asked, stack)
            elif question["about"] == "time":
                answer = {"time": time.time()}
            else:
                answer = together(question)
            print(json.dumps(answer), flush=True)


def alone(asked: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Any]:
    """What this host is like; files and ports that it makes for the others stay until `stack` is closed."""
    try:
        os.chdir(asked["folder"])
    except OSError as error:
        return {"folder": error.strerror}
    listener = stack.enter_context(socket.create_server(("", 0)))
    return {
        "python": platform.python_version().rpartition(".")[0],
        "packages": {name: _version(name) for name in asked["packages"]},
        "code": _code(),
        "index": _digest(Path(asked["shards"], "index.json")) if asked["shards"] else {},
        "gpus": gpus(),
        "cores": cores(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": _space("/dev/shm"),
        "network": _network({**os.environ, **asked["environment"]}),
        "port": _occupy(asked["port"], stack) if asked["number"] == 0 else None,
        "listener": listener.getsockname()[1],
        "written": [_write(folder, asked, stack) for folder in asked["shared"]],
    }


def gpus() -> int:
    """GPUs whose driver is loaded, whether or not anything can use them."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def cores() -> int:
    """Cores that processes here may use: those of the machine, of a `taskset`, or of a container's quota."""
    number = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no quota: the file is missing, or says max
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        number = min(number, max(1, int(quota) // int(period)))
    return number


def together(others: dict[str, Any]) -> dict[str, Any]:
    """Which of the other hosts' ports cannot be reached and which of their files cannot be seen."""
    unreached = []
    for name, address, port in others["connect"]:
        try:
            socket.create_connection((address, port), timeout=_SECONDS).close()
        except OSError as error:
            unreached.append([name, address, port, error.strerror or str(error)])
    seen = [os.path.exists(path) for path in others["written"]]
    return {
        "unreached": unreached,
        "unseen": [p for p, there in zip(others["written"], seen, strict=True) if not there],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> str | None:
    """One hash over the toolkit's own sources, as this interpreter would import them in this folder."""
    digest = hashlib.sha256()
    for room in ("launch", "scaler", "shards"):
        found = importlib.util.find_spec(room)
        if found is None:
            return None
        for folder in map(Path, found.submodule_search_locations or []):
            for path in sorted(folder.rglob("*.py")):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> dict[str, str | None]:
    try:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        return {"error": error.strerror}


def _space(folder: str) -> dict[str, int] | None:
    """Bytes of the file system of a folder, and those free to this user; None where there is no such folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def _network(environment: dict[str, str]) -> dict[str, Any]:
    """The interfaces (name → IPv4 address, if any), those that the environment chooses, and what gloo offers to others.

    Gloo offers the address of GLOO_SOCKET_IFNAME's (first) interface, and without that what the host's own name means.
    """
    found: dict[str, str | None] = {name: None for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in found:
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    chosen = [name for name in environment.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    try:
        offered = found.get(chosen[0]) if chosen else socket.gethostbyname(socket.gethostname())
    except OSError:
        offered = "127.0.0.1"
    return {
        "interfaces": found,
        "gloo": chosen,
        "nccl": environment.get("NCCL_SOCKET_IFNAME", ""),
        "offered": offered,
    }


def _occupy(port: int, stack: contextlib.ExitStack) -> str | None:
    """Listen where the processes will meet; why that cannot be, or None."""
    try:
        stack.enter_context(socket.create_server(("", port)))
    except OSError as error:
        return str(error.strerror).partition(" (")[0]  # without the address
    return None


def _write(folder: str, asked: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Leave a file in `folder`, or in the nearest folder above it that exists; how long that took."""
    place = Path(folder).absolute()
    while not os.path.isdir(place):
        place = place.parent
    path = place / f".scaler-check-{asked['token']}-{asked['number']}"
    report = {
        "folder": str(place),
        "path": None,
        "error": None,
        "space": _space(str(place)),
        "bytes": asked["bytes"],
        "checkpoints": len([*place.glob("step-*"), *place.glob("checkpoints/step-*")]),
    }
    started = time.perf_counter()
    try:
        with path.open("xb", buffering=0) as file:
            stack.callback(path.unlink, missing_ok=True)
            for _ in range(asked["bytes"] // _CHUNK):
                file.write(os.urandom(_CHUNK))
            os.fsync(file.fileno())
    except OSError as error:
        return {**report, "error": error.strerror}
    return {**report, "path": str(path), "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
