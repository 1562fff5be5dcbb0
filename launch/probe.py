"""What `launch.check` runs on each host: sent there as text, so it needs nothing but the standard library.

    python -c "$(cat launch/probe.py)" '{"number": 0, "folder": "/work", …}'

It answers each line of its standard input with one line of JSON: first what it finds on its host by itself, then,
once every host has come so far, what it sees of the others. It cleans up when standard input ends.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

_SIOCGIFADDR = 0x8915  # ask an interface for its IPv4 address
_SECONDS = 5.0  # for a connection to another host


def main() -> None:
    """Answer until standard input ends."""
    asked = json.loads(sys.argv[1])
    with contextlib.ExitStack() as stack:
        if sys.stdin.readline():
            print(json.dumps({**alone(asked, stack), "time": time.time()}), flush=True)
        if line := sys.stdin.readline():
            print(json.dumps(together(json.loads(line), asked)), flush=True)
        sys.stdin.read()


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
        "index": _sha256(Path(asked["shards"], "index.json")) if asked["shards"] else None,
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "loopback": _loopback(),
        "port": _occupy(asked["port"], stack) if asked["number"] == 0 else None,
        "listener": listener.getsockname()[1],
        "written": [_write(folder, asked, stack) for folder in asked["shared"]],
    }


def together(others: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Which of the other hosts' ports cannot be reached and which of their files cannot be seen."""
    unreached = []
    for name, port in others["connect"]:
        try:
            socket.create_connection((name, port), timeout=_SECONDS).close()
        except OSError as error:
            unreached.append([name, port, error.strerror or str(error)])
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


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _loopback() -> list[str]:
    """If this host's own name means loopback, which gloo would offer to the others: its real interfaces."""
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return []
    except OSError:
        pass
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if not socket.inet_ntoa(answer[20:24]).startswith("127."):
                    found.append(name)
    return found or ["INTERFACE"]


def _occupy(port: int, stack: contextlib.ExitStack) -> str | None:
    """Listen where the processes will meet; why that cannot be, or None."""
    try:
        stack.enter_context(socket.create_server(("", port)))
    except OSError as error:
        return error.strerror
    return None


def _write(folder: str, asked: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, str | None]:
    """Leave a file in `folder`, or in the nearest folder above it that exists."""
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    path = place / f".scaler-check-{asked['token']}-{asked['number']}"
    try:
        path.touch(exist_ok=False)
    except OSError as error:
        return {"folder": str(place), "path": None, "error": error.strerror}
    stack.callback(path.unlink, missing_ok=True)
    return {"folder": str(place), "path": str(path), "error": None}


if __name__ == "__main__":
    main()
