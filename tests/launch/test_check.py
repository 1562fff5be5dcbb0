"""Every problem of a host is found before a training is started there, and said in one line with its mending."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.check import check_hosts
from launch.job import Job
from scaler.recipe import load_recipe
from tests.hosts import TestHost, hosts

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
# Looks at hosts on request; a process of its own, since it must look from within the first host.
CODE = """
import json, os, sys
from launch.check import check_hosts
from launch.job import Host, Job
from scaler.recipe import load_recipe
for line in sys.stdin:
    folder, kind, names, options, words = json.loads(line)
    os.chdir(folder)
    recipe = load_recipe("dinov2/demo", overrides=words)
    job = Job("dinov2/demo", tuple(words), nodes=len(names), hosts=tuple(Host(n, 1) for n in names), **options)
    report = check_hosts(job, recipe, kind=kind)
    print(json.dumps([report.problems, report.unchecked]), flush=True)
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[list[TestHost]]:
    with hosts(2) as found:
        yield found


@pytest.fixture(scope="module")
def looker(machines: list[TestHost]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with machines[0].popen([sys.executable, "-c", CODE], env=environment, **pipes) as process:
        yield process


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with shards (their index alone) and one for runs."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/index.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.fixture
def check(looker: subprocess.Popen[str], place: Path) -> Callable[..., list[list[str]]]:
    """The problems, and what was not checked, of a job over both hosts, looked at from the first."""

    def check(
        *, kind: str = "torchrun", names: tuple[str, ...] = ("host1", "host2"), words: Any = (), **options: Any
    ) -> Any:
        words = [f"data.shards={place}/shards", f"run.dir={place}/runs/first", *words]
        assert looker.stdin is not None and looker.stdout is not None
        print(json.dumps([str(place), kind, names, options, words]), file=looker.stdin, flush=True)
        answer = json.loads(looker.stdout.readline())
        assert [path.name for path in place.rglob(".scaler-check-*")] == []
        return answer

    return check


@pytest.fixture
def altered(machines: list[TestHost], tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Gives a file another content on the second host alone."""
    done = []

    def alter(path: Path, content: str) -> None:
        (tmp_path / f"altered-{len(done)}").write_text(content)
        mount = ["mount", "--bind", str(tmp_path / f"altered-{len(done)}"), str(path)]
        assert machines[1].run(mount).returncode == 0
        done.append(path)

    yield alter
    for path in done:
        machines[1].run(["umount", str(path)])


def test_hosts_without_a_problem(check: Any) -> None:
    problems, unchecked = check()
    assert problems == []
    assert [line.partition(";")[0] for line in unchecked] == ["ports other than 29500 and a random one"]
    problems, unchecked = check(kind="deepspeed", strategy="zero2", words=["data.shards=s3://bucket/shards"])
    assert problems == [] and "data.shards on the hosts, since s3://bucket/shards is remote" in unchecked


def test_everything_that_differs_on_the_second_host(check: Any, altered: Any, place: Path) -> None:
    (info,) = SITE.glob("torch-[0-9]*.dist-info/METADATA")
    altered(info, "Metadata-Version: 2.1\nName: torch\nVersion: 0.4.1\n")
    altered(place / "shards/index.json", '{"other": 1}')
    altered(ROOT / "scaler/loop.py", "# other code\n")
    hook = min(SITE.glob("*.pth"))
    altered(hook, f"{hook.read_text()}\nimport time; time.time = lambda now=time.time: now() + 30\n")
    problems, _ = check()
    assert [line.startswith("host2: ") for line in problems] == [True] * 4, problems
    torch, code, shards, clock = problems
    assert "torch 0.4.1, but host1 has" in torch
    assert "another version of scaler's own code than on host1" in code
    assert "other shards than on host1" in shards
    assert "its clock is +" in clock and "chrony" in clock


def test_folders_that_are_not_shared(check: Any, machines: list[TestHost], place: Path) -> None:
    for folder in ("runs", "shards"):
        assert machines[1].run(["mount", "-t", "tmpfs", "tmpfs", str(place / folder)]).returncode == 0
    problems, _ = check()
    assert [line.split(" to ")[0].split(" no ")[0] for line in problems] == [
        "host2: data.shards:",
        "host1: does not see what host2 writes",
        "host2: does not see what host1 writes",
    ]
    machines[1].run(["mount", "-o", "remount,ro", str(place / "runs")])
    problems, _ = check()
    assert any(line.startswith(f"host2: cannot write to {place}/runs: Read-only") for line in problems)
    for folder in ("runs", "shards"):
        machines[1].run(["umount", str(place / folder)])
    machines[1].run(["mount", "-t", "tmpfs", "tmpfs", str(place.parent)])
    problems, _ = check()
    machines[1].run(["umount", str(place.parent)])
    assert problems == [f"host2: {place}: No such file or directory; run this where every host has the same folder"]


def test_a_port_that_is_taken_or_closed(check: Any, machines: list[TestHost]) -> None:
    listen = "import socket, time; s = socket.create_server(('', 29501)); print('up', flush=True); time.sleep(60)"
    process = machines[0].popen([sys.executable, "-c", listen], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    (problem,), _ = check(port=29501)
    assert problem.startswith("host1: port 29501: Address already in use") and "--port" in problem
    process.kill()
    process.wait()
    rule = ["to", "10.0.0.1", "ipproto", "tcp", "dport", "29501", "prohibit"]
    assert machines[1].run(["ip", "rule", "add", *rule]).returncode == 0
    (problem,), _ = check(port=29501)
    machines[1].run(["ip", "rule", "del", *rule])
    assert problem.startswith("host2: cannot reach host1, port 29501: ") and "or open 29501" in problem


def test_a_name_that_means_loopback(check: Any, altered: Any) -> None:
    altered(Path("/etc/hosts"), "127.0.0.1 localhost\n127.0.1.1 host2\n10.0.0.1 host1\n")
    (problem,), _ = check()
    assert problem.startswith("host2: its own name means loopback") and "--env GLOO_SOCKET_IFNAME=eth0" in problem
    assert check(environment={"GLOO_SOCKET_IFNAME": "eth0"})[0] == []


def test_interfaces_that_gloo_should_not_take(check: Any, machines: list[TestHost]) -> None:
    for machine in machines:  # a bridge as Docker makes it: the same address everywhere, and no way to the others
        for words in ("link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0", "link set docker0 up"):
            assert machine.run(["ip", *words.split()]).returncode == 0
    problems, _ = check(environment={"GLOO_SOCKET_IFNAME": "docker0"})
    for machine in machines:
        machine.run(["ip", "link", "del", "docker0"])
    assert [line.partition(":")[0] for line in problems] == ["host1", "host2"]
    assert "cannot reach host2 at 172.17.0.1, which gloo offers by GLOO_SOCKET_IFNAME=docker0: " in problems[0]
    assert all(line.endswith("; --env GLOO_SOCKET_IFNAME=eth0") for line in problems)
    problems, _ = check(environment={"GLOO_SOCKET_IFNAME": "lo"})
    assert [line.partition(" ")[0] for line in problems] == ["host1:", "host2:"]
    assert all("GLOO_SOCKET_IFNAME=lo means loopback" in line for line in problems)


def test_hosts_that_cannot_be_reached(check: Any, machines: list[TestHost], altered: Any) -> None:
    (problem,), _ = check(names=("host1", "host3"))
    assert problem.startswith("host3: no ssh (") and "is it up" in problem
    altered(Path("/etc/ssh/user_key.pub"), "")
    (problem,), _ = check()
    assert problem.startswith("host2: no ssh without a password (") and "ssh-copy-id host2" in problem


def test_another_interpreter(check: Any, machines: list[TestHost]) -> None:
    folder = str(Path(sys.executable).parent)
    machines[1].run(["mount", "-t", "tmpfs", "tmpfs", folder])
    (problem,), _ = check()
    machines[1].run(["umount", folder])
    assert problem == f"host2: no {sys.executable}; make the same environment at the same path there"


def test_this_machine_and_machines_unknown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = load_recipe("dinov2/demo", overrides=["data.shards=shards", "run.dir=runs/first"])
    assert check_hosts(Job("dinov2/demo"), recipe, kind="torchrun").problems == []
    (place / "shards/index.json").unlink()
    (problem,) = check_hosts(Job("dinov2/demo"), recipe, kind="torchrun").problems
    assert problem.startswith("this machine: data.shards: no shards/index.json there")
    for kind, job, reason in (
        ("torchrun", Job("dinov2/demo", nodes=2), "the 2 machines, whose names are not known"),
        ("slurm", Job("dinov2/demo", nodes=2), "the machines, which the scheduler will choose"),
    ):
        report = check_hosts(job, recipe, kind=kind)
        assert not report.problems and report.unchecked[0].startswith(reason)
    assert not list(place.rglob(".scaler-check-*"))
