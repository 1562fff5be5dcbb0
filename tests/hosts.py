"""Several real hosts on one machine, for tests of launchers and of networks that fail.

    with hosts(2) as (one, two):
        one.run(["ssh", two.name, "hostname"])
        process = two.popen([sys.executable, "-m", "…"])
        two.cut()

A host is a set of namespaces: a network of its own (eth0 on a bridge, and loopback), a hostname, names (/etc/hosts),
/etc/ssh and process ids. Its process 1 is sshd, and every host accepts the one key that all of them hold. Files are
the machine's own, so that every folder is shared, as on a cluster with a network file system. Nothing of it can be
seen from outside, several such networks can be up at once, and when process 1 ends the kernel ends all the host's
processes and takes its network away; process 1 ends with the test's process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.packages import PATH, install

_PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}

_START_HOST = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/ssh" /etc/ssh
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
hostname "$2"
ip link set lo up
exec "$3" -D -e -f /etc/ssh/sshd_config
"""


@dataclass(frozen=True)
class TestHost:
    """One host.

    Attributes:
        name: its hostname, under which all hosts reach it.
        address: its IPv4 address on eth0.
        init: the machine's number of the host's process 1.
        switch: the machine's number of a process in the network that holds the bridge.
        port: the bridge's end of the cable.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    name: str
    address: str
    init: int
    switch: int
    port: str

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in this host; signals sent to the result reach the command itself."""
        folder = f"wdns={os.path.abspath(options.pop('cwd', '.'))}"  # a mount namespace is entered at its root
        return _Inside([*_enter(self.init, "net", "mount", "uts", "pid", folder), *command], **options)

    def run(self, command: Sequence[str], *, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in this host to its end and capture its output as text; killed after `timeout` seconds."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.popen(command, **{**pipes, **options}) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def processes(self) -> list[str]:
        """The command lines of the processes that run in this host, apart from sshd's own."""
        return [line for _, line in self._processes()]

    def kill(self, words: str) -> int:
        """SIGKILL every process of this host whose command line holds `words`; how many that were."""
        found = [number for number, line in self._processes() if words in line]
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, 9)
        return len(found)

    def cut(self) -> None:
        """Pull the network cable: packets are lost and nobody is told."""
        _run([*_enter(self.switch, "net"), "ip", "link", "set", self.port, "down"])

    def restore(self) -> None:
        """Put the network cable back."""
        _run([*_enter(self.switch, "net"), "ip", "link", "set", self.port, "up"])

    def lose(self) -> None:
        """Switch the host off: all its processes end at once, and its network is gone for good."""
        os.kill(self.init, 9)

    def _processes(self) -> list[tuple[int, str]]:
        """The machine's numbers and the command lines of the host's living processes."""
        mine = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(folder / "ns" / "pid") == mine:
                    line = (folder / "cmdline").read_text().replace("\0", " ").strip()
                    if line and not line.startswith("sshd"):  # a zombie has no command line
                        found.append((int(folder.name), line))
        return [(number, line) for number, line in found if number != self.init]


@contextlib.contextmanager
def hosts(num_hosts: int = 2) -> Iterator[list[TestHost]]:
    """Bring up `num_hosts` hosts (host1, host2, … at 10.0.0.1, 10.0.0.2, …) and take them down in the end.

    Skips the test, with the reason, where namespaces or programs are missing and cannot be had.
    """
    if (reason := _unavailable()) is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        names = [f"host{i + 1}" for i in range(num_hosts)]
        addresses = [f"10.0.0.{i + 1}" for i in range(num_hosts)]
        _write_etc(folder, dict(zip(names, addresses, strict=True)))

        switch = stack.enter_context(_namespaces(["--net"], ["sleep", "infinity"], folder / "switch.log"))
        for command in ("ip link add bridge type bridge", "ip link set bridge up"):
            _run([*_enter(switch, "net"), *command.split()])
        found = []
        for name, address in zip(names, addresses, strict=True):
            start = ["sh", "-c", _START_HOST, "sh", str(folder), name, str(shutil.which("sshd", path=PATH))]
            init = stack.enter_context(_namespaces(["--net", "--uts"], start, folder / f"{name}.log"))
            cable = f"ip link add {name} type veth peer name eth0 netns {init}"
            for command in (cable, f"ip link set {name} master bridge", f"ip link set {name} up"):
                _run([*_enter(switch, "net"), *command.split()])
            for command in (f"ip address add {address}/24 dev eth0", "ip link set eth0 up"):
                _run([*_enter(init, "net"), *command.split()])
            found.append(TestHost(name=name, address=address, init=init, switch=switch, port=name))
        for host in found:
            _wait_for_ssh(found[0], host, folder / f"{host.name}.log")
        yield found


class _Inside(subprocess.Popen[Any]):
    """A command behind nsenter, which waits for it and ends as it does, but keeps signals to itself."""

    def send_signal(self, number: int) -> None:
        for child in _children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def _unavailable() -> str | None:
    """Why there can be no hosts here; missing programs are installed where that does no harm."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    probe = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/run"]
    if not all(shutil.which(name) for name in ("unshare", "nsenter", "setpriv")):
        return "unshare, nsenter or setpriv of util-linux is missing"
    if (result := subprocess.run(probe, capture_output=True, text=True)).returncode != 0:
        return f"no namespaces here: {result.stderr.strip()}"
    return install(_PROGRAMS)


def _write_etc(folder: Path, addresses: dict[str, str]) -> None:
    """What the hosts see as /etc/hosts and /etc/ssh: one key for hosts and users, and no other way in."""
    lines = [f"{address} {name}" for name, address in addresses.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{line}\n" for line in lines))
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once; a real one's would time out
    ssh = folder / "ssh"
    ssh.mkdir(mode=0o700)
    for name in ("host_key", "user_key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)])
    host_key = (ssh / "host_key.pub").read_text()
    (ssh / "known_hosts").write_text("".join(f"{name},{address} {host_key}" for name, address in addresses.items()))
    (ssh / "ssh_config").write_text(
        "IdentityFile /etc/ssh/user_key\nIdentitiesOnly yes\nGlobalKnownHostsFile /etc/ssh/known_hosts\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (ssh / "sshd_config").write_text(
        "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/user_key.pub\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\nStrictModes no\nUseDNS no\n"
        "PidFile none\nMaxStartups 100\n"
    )


@contextlib.contextmanager
def _namespaces(kinds: list[str], command: list[str], log: Path) -> Iterator[int]:
    """Run `command` as process 1 of new namespaces; its number as the machine sees it."""
    unshare = ["unshare", *kinds, "--pid", "--mount-proc", "--fork", "--kill-child"]
    with log.open("w") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *unshare, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": PATH},
        )
    try:
        deadline = time.monotonic() + 30
        while not (children := _children(process.pid)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        yield children[0]
    finally:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _enter(pid: int, *options: str) -> list[str]:
    """The words before a command that run it in the namespaces of process `pid`."""
    return ["nsenter", f"--target={pid}", *(f"--{option}" for option in options), "--"]


def _wait_for_ssh(source: TestHost, target: TestHost, log: Path) -> None:
    deadline = time.monotonic() + 30
    while (result := source.run(["ssh", target.name, "hostname"])).stdout.strip() != target.name:
        assert time.monotonic() < deadline, f"no ssh to {target.name}: {result.stderr}{log.read_text()}"
        time.sleep(0.1)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
