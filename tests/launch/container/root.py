"""Root file systems to run commands in: a tree as it is below, and what is written above it thrown away or kept apart.

    with root_over([Path("/")]) as root:
        root.path("/etc/motd").write_text("…")     # this machine's own stays as it is
        root.run(["id"], user="nobody")

A root has namespaces of its own (mounts, processes, host name, and a network with nothing but loopback and one address
that nobody else sees), and a user in it has what compose.yaml leaves him: no capabilities, none to be gained.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.packages import PATH

OUTER = "10.9.8.7"  # the address that is not loopback
OWN = frozenset(("proc", "sys", "dev", "tmp", "run"))  # folders that each root has for itself
_LIBC = ctypes.CDLL(None, use_errno=True)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The tree below may hold the folder for what is written above it, which overlayfs forbids: that is a tmpfs then.
_START = """
set -e
place=$1 lower=$2 upper=$3 outer=$4
shift 4
mount -t tmpfs -o mode=755 tmpfs "$place"
if [ -z "$upper" ]; then upper=$place; fi
mkdir -p "$upper/upper" "$upper/work" "$place/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper/upper,workdir=$upper/work" "$place/root"
cd "$place/root"
mkdir -p proc sys dev tmp run
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs run
for folder in "$@"; do
    mkdir -p "./$folder"
    mount --bind -o ro "$folder" "./$folder"
done
if [ -n "$outer" ]; then
    ip link set lo up
    ip link add outer type veth peer name other
    ip address add "$outer/24" dev outer
    ip link set outer up
fi
echo ready
exec sleep infinity
"""


class Root:
    """A root file system in use.

    Attributes:
        pid: the machine's number of the process that holds its namespaces.
    """

    def __init__(self, pid: int, place: Path) -> None:
        self.pid, self._place = pid, place

    def path(self, inside: str) -> Path:
        """Where the machine's root sees `inside`."""
        return Path(f"/proc/{self.pid}/root{self._place}/root/{inside.lstrip('/')}")

    def command(
        self,
        command: Sequence[str],
        *,
        user: str = "root",
        environment: Mapping[str, str] | None = None,
        folder: str = "/",
        first: bool = False,
    ) -> list[str]:
        """The words that run `command` in here with no other variables than `environment`; `first`: as process 1."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--uts", "--ipc"]
        enter += ["chroot", f"{self._place}/root", "/usr/bin/env", "-C", folder, "-i"]
        enter += [f"{name}={value}" for name, value in {"PATH": _PATH, **(environment or {})}.items()]
        if first:
            enter += ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        if user != "root":
            number, group = self._numbers(user)
            enter += ["setpriv", f"--reuid={number}", f"--regid={group}", "--clear-groups"]
            enter += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        return [*enter, *command]

    def run(self, command: Sequence[str], *, timeout: float = 1200, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `command` in here to its end; the keywords are those of `command`."""
        words = self.command(command, **options)
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)

    def _numbers(self, user: str) -> tuple[str, str]:
        """The numbers of a user, given by name or number, and of his group."""
        entries = [line.split(":") for line in self.path("/etc/passwd").read_text().splitlines()]
        return next((entry[2], entry[3]) for entry in entries if user in (entry[0], entry[2]))

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection within this root's network: a socket stays in the network of the thread that has made it."""

        def from_inside() -> socket.socket:
            with open(f"/proc/{self.pid}/ns/net") as network:
                assert _LIBC.setns(network.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            return socket.create_connection((address, port), timeout=20)

        with ThreadPoolExecutor(1) as threads:
            return threads.submit(from_inside).result()

    def freeze(self, *writable: str) -> None:
        """Make it read-only but for these folders and /tmp, as compose.yaml does."""
        script = 'for folder in "$@"; do mount --bind "$folder" "$folder"; done; mount -o remount,bind,ro /'
        result = self.run(["sh", "-ec", script, "sh", *writable])
        assert result.returncode == 0, result.stderr


@contextlib.contextmanager
def root_over(
    lower: Sequence[Path], *, upper: Path | None = None, network: bool = False, mounted: Sequence[Path] = ()
) -> Iterator[Root]:
    """A root over the trees of `lower`, the first one on top.

    Skips the test, with the reason, where that cannot be done.

    Args:
        lower: trees, which stay as they are.
        upper: folder for what is written, in its `upper`; None: it is thrown away.
        network: the machine's own network, for building; otherwise one apart.
        mounted: folders of the machine to be seen at the same place, read-only.
    """
    if os.geteuid() != 0:
        pytest.skip("root file systems of our own need root")
    if not all(shutil.which(name, path=PATH) for name in ("unshare", "nsenter", "setpriv", "ip")):
        pytest.skip("unshare, nsenter, setpriv (util-linux) or ip (iproute2) is missing")
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="root-")))
        apart = [] if network else ["--net"]
        start = ["unshare", "--mount", "--pid", "--uts", "--ipc", *apart, "--fork", "--kill-child"]
        start += ["sh", "-c", _START, "sh", str(place), ":".join(map(str, lower)), str(upper or "")]
        start += [OUTER if apart else "", *map(str, mounted)]
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *start],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": PATH},
        )
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no root file system of our own here: {holder.stderr.read().strip()}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Root(int(children[0]), place)
