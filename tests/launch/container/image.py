"""The image of launch/container without an engine: its users, files and settings over a tree that has its programs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.container.dockerfile import Stage, carry_out, parse, variables_of
from tests.launch.container.root import OWN, Root, root_over
from tests.machine import children
from tests.packages import install

ROOT = Path(__file__).parents[3]
CONTAINER = ROOT / "launch/container"
COMPOSE = yaml.safe_load((CONTAINER / "compose.yaml").read_text())
ARGUMENTS, (BUILD, FINAL) = parse((CONTAINER / "Dockerfile").read_text())

_PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "tini": "tini"}
_USER_ID = "1000"
_SECONDS = 60


@dataclass
class Container:
    """A container that could be started: a root that can be written to where compose.yaml says, and no further."""

    root: Root
    user: str

    def command(self, *words: str, **variables: str) -> list[str]:
        """The words that start it: the image's entrypoint with `words`."""
        return self.root.command([*FINAL.the("ENTRYPOINT").words, *words], **self._as_user(variables))

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Start it and wait for its end."""
        return self.root.run([*FINAL.the("ENTRYPOINT").words, *words], timeout=5 * _SECONDS, **self._as_user(variables))

    def secret(self, name: str, text: str) -> None:
        """Mount a file under /run/secrets, as compose.yaml does: with the owner and mode that it has outside."""
        path = self.root.path(f"/run/secrets/{name}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)

    @contextlib.contextmanager
    def service(self, *words: str, port: int, **variables: str) -> Iterator[Service]:
        """Start it, wait until it listens on `port`, and stop it with SIGTERM in the end."""
        log = self.root.path("/tmp") / f"log-{time.monotonic_ns()}"
        with log.open("w") as file:
            process = subprocess.Popen(self.command(*words, **variables), stdout=file, stderr=file)
        service = Service(process, log)
        try:
            deadline = time.monotonic() + _SECONDS
            while port not in listening(self.root):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield service
        finally:
            service.stop()

    def _as_user(self, variables: dict[str, str]) -> dict[str, Any]:
        folder = FINAL.the("WORKDIR").value
        environment = {**variables_of(FINAL), **variables}
        return {"user": self.user, "environment": environment, "folder": folder, "first": True}


@dataclass
class Service:
    """What a container runs: its process 1 is behind nsenter and unshare, which end as it does."""

    process: subprocess.Popen[Any]
    log: Path | None = None

    def stop(self) -> int:
        """SIGTERM to process 1, as `docker stop` sends it; the exit code."""
        if self.process.poll() is None:
            (unshare,) = children(self.process.pid)
            (one,) = children(unshare)
            os.kill(one, signal.SIGTERM)
        return self.process.wait(timeout=_SECONDS)


def listening(root: Root) -> dict[int, list[str]]:
    """The TCP ports on which something listens in there, with the addresses."""
    found: dict[int, list[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{root.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == "0A":
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.setdefault(int(port, 16), []).append(str(ipaddress.ip_address(b"".join(words))))
    return found


@contextlib.contextmanager
def container(built: list[Path] | None = None) -> Iterator[Container]:
    """The image as a container of it sees it.

    Args:
        built: the trees that building it has left; None: this machine's programs and Python, upon which those steps of
            the Dockerfile's last stage are carried out that install nothing.
    """
    if built is None and (reason := install(_PROGRAMS)) is not None:
        pytest.skip(reason)
    # An overlay over / does not show what other disks hold, nor what lies under a folder that is a root's own.
    ours = () if built else (ROOT, Path(sys.prefix), Path(sys.base_prefix))
    mounted = [path for path in ours if path.stat().st_dev != Path("/").stat().st_dev or path.parts[1] in OWN]
    with root_over(built or [Path("/")], mounted=mounted) as root:
        user = _USER_ID if built else dress(root)
        root.freeze("/home/scaler", "/runs")
        yield Container(root, user)


def dress(root: Root, *, user_id: str = _USER_ID) -> str:
    """Make an image of this machine's tree; the user that it runs as."""
    ours = [one for one in FINAL.instructions if "--from=build" not in one.value]
    user = carry_out(
        Stage(FINAL.name, FINAL.base, ours),
        root,
        context=ROOT,
        arguments={"USER_ID": user_id},
        stages={},
        environment={},
        wanted=lambda script: "apt-get" not in script,
    )
    root.path("/opt/scaler").symlink_to(sys.prefix)
    for place in (sys.prefix, os.path.realpath(sys.executable), str(ROOT)):
        for folder in map(root.path, map(str, Path(place).parents)):
            if folder.stat().st_mode & 0o005 != 0o005:  # what is mounted cannot be changed
                folder.chmod(0o755)
    return user
