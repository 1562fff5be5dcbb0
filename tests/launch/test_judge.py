"""What a machine lacks for a job is found before the job meets it: disks, shared memory, ports, interfaces."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from launch.check import look
from launch.job import Job
from launch.judge import nccl_finds
from scaler.doctor.finding import Finding
from scaler.doctor.needs import Needs
from tests.scaler.doctor.faults import small_machine

# Looks at the machine it runs on, whose port the test holds.
CODE = """
import json, sys
from dataclasses import asdict
from launch.check import look
from launch.job import Job
from scaler.doctor.needs import Needs
full, port = sys.argv[1:]
needs = Needs(folders=("/dev/shm/run", full), checkpoints="/dev/shm/run", checkpoint_bytes=30_000_000,
              num_checkpoints=3, loader_processes=16, loader_bytes=2_500_000_000)
report = look(Job("", port=int(port)), needs, written=8 << 20)
print(json.dumps([asdict(finding) for finding in report.findings]))
"""


def here(
    *, environment: dict[str, str] | None = None, nodes: int = 1, needs: Needs | None = None
) -> dict[str, Finding]:
    """What is found on this machine, by check."""
    report = look(Job("", environment=environment or {}, nodes=nodes), needs or Needs(), port=False)
    assert {finding.host for finding in report.findings} == {"this machine"}
    return {finding.check: finding for finding in report.findings}


def test_full_disks_small_shared_memory_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = small_machine([sys.executable, "-c", CODE, str(tmp_path), port], tmp_path)
    assert said.returncode == 0, said.stderr
    findings = [Finding(**finding) for finding in json.loads(said.stdout)]
    room, disk, listening, shm = (finding for finding in findings if finding.level == "error")
    assert disk.found == f"cannot write to {tmp_path}: No space left on device" and disk.fix.startswith("free some (du")
    assert "/dev/shm: 67.1 MB free" in room.found and "3 checkpoints of 30 MB are to come" in room.found
    assert "checkpoint.keep_last=1" in room.fix
    assert listening.found == f"port {port}: Address already in use" and f"ss -ltnp sport = :{port}" in listening.fix
    assert shm.found == "67.1 MB of 67.1 MB free; 16 loader processes take up to 2.5 GB"
    assert "docker run --shm-size=3g" in shm.fix and "mount -o remount,size=3G /dev/shm" in shm.fix
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_a_fault(tmp_path: Path) -> None:
    found = here(needs=Needs(folders=(str(tmp_path / "new/run"),)))
    assert found["disk"].level == "ok" and found["disk"].facts["folder"] == str(tmp_path)
    assert found["network"].level == "ok" and found["cores"].level == "ok"
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    needs = Needs(folders=(f"{tmp_path}/run",), checkpoints=f"{tmp_path}/run", checkpoint_bytes=9, num_checkpoints=3)
    assert "2 checkpoints of 9e-06 MB are to come" in here(needs=needs)["disk"].found, "one is there"
    crowded = here(needs=Needs(loader_processes=10_000, loader_bytes=1))["cores"]
    assert crowded.level == "warning" and crowded.fix.startswith("data.num_workers=")


@pytest.mark.parametrize("nodes", [1, 2])
def test_interfaces_that_gloo_cannot_take(nodes: int) -> None:
    found = here(environment={"GLOO_SOCKET_IFNAME": "nosuch0"}, nodes=nodes)["network"]
    assert found.level == "error" and found.found.startswith("GLOO_SOCKET_IFNAME names nosuch0, which it does not have")
    assert found.fix.startswith("export GLOO_SOCKET_IFNAME=")
    found = here(environment={"GLOO_SOCKET_IFNAME": "lo"}, nodes=nodes)["network"]
    assert (found.level == "error") == (nodes > 1), "loopback is right on one machine alone"
    assert nodes == 1 or found.found.startswith("GLOO_SOCKET_IFNAME=lo means loopback, which gloo would offer")


@pytest.mark.parametrize(
    ("pattern", "finds"),
    [("", True), ("eth", True), ("=eth", False), ("=eth0", True), ("ib,eth", True), ("ib", False), ("^eth,lo", False),
     ("^lo", True), ("^=eth", True)],
)  # fmt: skip
def test_the_interfaces_that_nccl_takes(pattern: str, finds: bool) -> None:
    assert nccl_finds(pattern, ["lo", "eth0"]) == finds
