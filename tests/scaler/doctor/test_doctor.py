"""`scaler doctor` as a user meets it: everything at once, on one machine, on several, and under a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from shards.convert import convert
from tests.hosts import hosts
from tests.images import make_image_folder
from tests.long import only_long
from tests.scaler.doctor.faults import old_package, small_machine, wrong_torchvision
from tests.scaler.test_cli import scaler

DOCTOR = [sys.executable, "-m", "scaler.cli", "doctor"]
SITE = Path(sysconfig.get_paths()["purelib"])
# root, but with no more rights over other users' files than they give
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with shards and a place for runs."""
    make_image_folder(tmp_path / "images", num_images=60)
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    (tmp_path / "runs").mkdir()
    return tmp_path


def problems(said: str) -> list[dict[str, str]]:
    """What was found of all that is wrong."""
    return [finding for finding in json.loads(said)["findings"] if finding["level"] != "ok"]


def expect(found: list[dict[str, str]], wanted: Sequence[tuple[str, str, str]]) -> None:
    """Every fault is there: where (check and host), with these words about it and these about its mending."""
    for place, what, fix in wanted:
        here = [finding for finding in found if f"{finding['check']} {finding['host']}".strip() == place]
        assert any(what in finding["found"] and fix in finding["fix"] for finding in here), (place, what, found)


def test_words_that_cannot_be_right(place: Path) -> None:
    (place / "hosts").write_text("node-1\n")
    for words, why in (
        (["--hosts", place / "hosts"], "is not `NAME slots=N`"),
        (["data.shards=a"], "is no recipe; name one first"),
    ):
        said = scaler("doctor", *words, "--quick")
        assert (said.returncode, why in said.stderr) == (2, True), said


def test_the_doctor_outlives_what_the_rest_cannot_do_without(place: Path) -> None:
    (place / "yaml").mkdir()
    (place / "yaml/__init__.py").write_text("raise ImportError('libyaml.so: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": f"{place}:{os.getcwd()}"}
    said = subprocess.run([*DOCTOR, "--json"], env=environment, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (1, "")
    expect(
        problems(said.stdout), [("scaler", "cannot be imported: libyaml.so", "pip install --force-reinstall scaler")]
    )


@only_long
def test_a_machine_full_of_faults(place: Path) -> None:
    wrong_torchvision(place / "site")
    old_package(place / "site", "deepspeed", "0.15.4")
    (place / "shards/index.json").rename(place / "index.json")
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["--shards", str(place / "shards"), "--run-dir", str(place / "runs/first"), "--port", port, "--json"]
        said = small_machine([*DOCTOR, *words], place / "runs", PYTHONPATH=f"{place}/site:{os.getcwd()}")
    assert said.returncode == 1, said.stderr
    expect(
        problems(said.stdout),
        [
            ("torch", "torchvision 0.26.0 wants ==2.11.0", "torchvision"),
            ("torchvision", "torchvision::nms does not exist", "pip install --upgrade 'torch=="),
            ("deepspeed", "0.15.4 is installed, scaler ", "pip install --upgrade 'deepspeed>=0.19'"),
            ("deepspeed", "installed as 0.15.4 and", "pip uninstall deepspeed"),
            ("disk", "No space left on device", "free some"),
            ("/dev/shm", "67.1 MB of 67.1 MB free", "--shm-size"),
            ("port", f"port {port}: Address already in use", "--port"),
            ("shards", "holds no index.json, and 1 shard", f"scaler index {place}/shards"),
        ],
    )
    (place / "index.json").rename(place / "shards/index.json")
    os.chown(place / "shards", 65534, 65534)
    (place / "shards").chmod(0o700)
    words = ["dinov2/vits16_in1k", "--shards", str(place / "shards"), "--run-dir", str(place / "runs/first"), "--json"]
    said = small_machine([*WITHOUT_RIGHTS, *DOCTOR, *words, "--processes", "8"], place / "runs")
    assert said.returncode == 1, said.stderr
    expect(
        problems(said.stdout),
        [
            ("shards", f"{place}/shards belongs to nobody, mode 700", f"chmod -R a+rX {place}/shards"),
            ("/dev/shm", "80 loader processes take up to", "--shm-size"),
            ("cores", "80 loader processes", "data.num_workers="),
        ],
    )


@only_long
def test_hosts_full_of_faults(place: Path) -> None:
    (place / "hosts").write_text("host1 slots=1\nhost2 slots=1\nhost3 slots=1\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "docker0"}
    with hosts(3) as machines:
        machines[2].cut()
        for machine in machines[:2]:
            for line in (
                "link add docker0 type bridge",
                "address add 172.17.0.1/16 dev docker0",
                "link set docker0 up",
            ):
                machine.run(["ip", *line.split()])
        hook = min(SITE.glob("*.pth"))
        (place / "hook").write_text(f"{hook.read_text()}\nimport time; time.time = lambda t=time.time: t() + 30\n")
        machines[1].run(["mount", "--bind", str(place / "hook"), str(hook)])
        words = ["--hosts", "hosts", "--shards", "shards", "--run-dir", "runs/first"]
        said = machines[0].run([*DOCTOR, *words, "--json"], env=environment, cwd=place)
        table = machines[0].run([*DOCTOR, *words], env=environment, cwd=place).stdout
    assert said.returncode == 1, said.stderr
    expect(
        problems(said.stdout),
        [
            ("host host3", "no ssh (", "is it up"),
            ("clock host2", "its clock is +", "chrony"),
            ("network host1", "cannot reach host2 at 172.17.0.1, which gloo offers", "GLOO_SOCKET_IFNAME=eth0"),
        ],
    )
    assert "error   clock" in table and "→ run a time service (chrony) on both" in table


@only_long
def test_under_torchrun_on_two_machines(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29600"]
    doctor = ["-m", "scaler.cli", "doctor", "--run-dir", "runs/first", "--json"]
    with hosts(2) as (one, two):
        other = two.popen([*torchrun, *doctor], env=environment, cwd=place)
        said = one.run([*torchrun, *doctor], env=environment, cwd=place)
        other.wait(timeout=60)
    printed = next(line for line in said.stdout.splitlines() if line.startswith("{"))
    findings = {(f["check"], f["host"]): f for f in json.loads(printed)["findings"]}
    assert findings["torch", "host1"]["level"] == findings["torch", "host2"]["level"] == "ok"
    assert findings["all-reduce", ""]["found"] == "4 processes on 2 machines add up exactly"
    assert findings["clock", ""]["level"] == "ok" and findings["bandwidth", ""]["facts"]["bytes_per_second"] > 1e6
