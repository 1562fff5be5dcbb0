"""What the files of launch/container say: linted, consistent with the lock and with each other, nothing left open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.job import Job
from launch.slurm import plan
from tests.launch.container.dockerfile import Instruction, ignored, parse, variables_of
from tests.launch.container.image import ARGUMENTS, BUILD, COMPOSE, CONTAINER, FINAL, ROOT
from tests.lock import read_lock
from tests.long import only_long
from tests.packages import install
from tests.runs import write_recipe

INSTRUCTIONS = [*BUILD.instructions, *FINAL.instructions]
RULES = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
PROFILES = ("train", "notebook", "ssh")


@pytest.mark.parametrize(("linter", "file"), [("hadolint", "Dockerfile"), ("shellcheck", "entrypoint")])
def test_linters_find_nothing(linter: str, file: str) -> None:
    result = subprocess.run([Path(sys.prefix, "bin", linter), CONTAINER / file], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


def test_the_lock_decides_what_is_in_the_image() -> None:
    (cuda,) = (pin for pin in read_lock() if pin.name == "cuda-toolkit")
    found = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-", ARGUMENTS["BASE"])
    assert found and cuda.version.startswith(f"{found[1]}."), "torch brings another CUDA than the base image has"
    assert BUILD.base == FINAL.base == ARGUMENTS["BASE"]
    installs = [
        line for one in INSTRUCTIONS if one.word == "RUN" for line in one.value.splitlines() if "pip install" in line
    ]
    assert len(installs) == 3 and all("--require-hashes" in line or "--no-deps" in line for line in installs)


def test_it_runs_as_a_user_and_holds_no_secret() -> None:
    words = [one.word for one in FINAL.instructions]
    assert FINAL.the("USER").value == "${USER_ID}" and words.index("USER") > max(
        i for i, word in enumerate(words) if word == "RUN"
    )
    assert Instruction("ARG", "USER_ID=1000") in FINAL.instructions, "a number, and not 0"
    assert FINAL.the("HEALTHCHECK").value.endswith('CMD ["scaler", "doctor", "--quick"]')
    assert FINAL.the("STOPSIGNAL").value == "SIGTERM" and FINAL.the("ENTRYPOINT").words[0] == "/usr/bin/tini"
    assert variables_of(FINAL)["PATH"].startswith("/opt/scaler/bin:/usr/local/sbin:")
    named = {one.value.partition("=")[0] for one in INSTRUCTIONS if one.word == "ARG"} | set(variables_of(FINAL))
    assert not [name for name in named if re.search("TOKEN|PASS|SECRET|KEY", name)]


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    sources = [
        word for one in INSTRUCTIONS if one.word == "COPY" and "--from" not in one.value for word in one.words[:-1]
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    sent = [name for name in tracked.stdout.splitlines() if not ignored(name, RULES)]
    for source in (word for word in sources if not word.startswith("--")):
        assert any(name == source or name.startswith(f"{source}/") for name in sent), source
    rooms = ("scaler/", "shards/", "launch/", "configs/")
    assert [name for name in sent if not name.startswith(rooms) and "/" in name] == []
    code = {
        name
        for name in tracked.stdout.splitlines()
        if name.startswith(rooms) and not name.startswith("launch/container")
    }
    assert code <= set(sent)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("scaler/train.py", False),
        ("shards/_kernel.c", False),
        ("launch/container/entrypoint", False),
        ("launch/container/notebook_token", True),
        ("launch/container/secrets/authorized_keys", True),
        ("scaler/.env", True),
        ("configs/.netrc", True),
        ("scaler/__pycache__/train.cpython-311.pyc", True),
        ("shards/_kernel.cpython-311-x86_64-linux-gnu.so", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("runs/first/wandb/settings", True),
        ("tests/lock.py", True),
    ],
)
def test_what_an_engine_is_sent(name: str, wanted: bool) -> None:
    assert ignored(name, RULES) is wanted


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_gives_no_more_than_it_needs(profile: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][profile]
    assert service["profiles"] == [profile]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "user", "devices"} & service.keys()
    assert all(port.startswith("${SCALER_PUBLISH:-127.0.0.1}:") for port in service.get("ports", []))
    assert not any(re.search("TOKEN|PASSWORD", name) for name in service["environment"])
    assert service["shm_size"].endswith("gb}") and service["stop_grace_period"] == "5m"
    data, runs, home = service["volumes"]
    assert data.endswith("/data:/data:ro") and runs.endswith("/runs:/runs") and home == "home:/home/scaler"
    writable = {"/home/scaler", *(one.value for one in FINAL.instructions if one.word == "WORKDIR")}
    assert writable == {"/home/scaler", "/runs"}


def test_services_say_what_the_image_understands() -> None:
    assert COMPOSE["services"].keys() == set(PROFILES)
    for profile in ("notebook", "ssh"):
        service = COMPOSE["services"][profile]
        assert service["command"] == profile and service["environment"]["SCALER_ADDRESS"] == "0.0.0.0"
        (secret,) = service["secrets"]
        assert f"$secrets/{secret}" in (CONTAINER / "entrypoint").read_text()
    assert (
        "ports" not in COMPOSE["services"]["train"]
        and "SCALER_ADDRESS" not in COMPOSE["services"]["train"]["environment"]
    )
    text = (CONTAINER / "compose.yaml").read_text()
    header = text[: text.index("\nx-scaler")]
    assert {name for name in re.findall(r"\$\{(SCALER_\w+)", text) if name not in header} == {"SCALER_IMAGE"}


@only_long
def test_compose_itself_understands_it() -> None:
    if (reason := install({"docker-compose": "docker-compose"})) is not None:
        pytest.skip(reason)
    profiles = [word for name in PROFILES for word in ("--profile", name)]
    result = subprocess.run(
        ["docker-compose", "-f", CONTAINER / "compose.yaml", *profiles, "config"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert services["train"]["command"] == "scaler train --help"
    assert services["ssh"]["environment"]["TORCHINDUCTOR_CACHE_DIR"] == "/home/scaler/.cache/inductor"


@pytest.mark.parametrize("container", ["apptainer exec", "--container-image"])
def test_the_notes_for_slurm_make_a_job_of_a_job_file(container: str, tmp_path: Path) -> None:
    job = Job(str(write_recipe(tmp_path / "recipe.yaml", "simclr", shards=tmp_path)), nodes=2, processes=2)
    file = tmp_path / "job.sbatch"
    file.write_text(plan(job).text.replace(sys.executable, "/opt/scaler/bin/python"))
    notes = [
        line[1:].strip() for line in (CONTAINER / "Dockerfile").read_text().splitlines() if line.startswith("#   sed ")
    ]
    (note,) = (line for line in notes if container in line)
    subprocess.run(["sh", "-ec", note], cwd=tmp_path, check=True)
    (line,) = (line for line in file.read_text().splitlines() if container in line)
    assert line.index("srun") < line.index(container) < line.index("/opt/scaler/bin/python -m torch.distributed.run")
    subprocess.run(["bash", "-n", file], check=True)


def test_lines_are_read_as_docker_reads_them() -> None:
    text = "ARG B=x\nFROM ${B} AS one\nRUN a \\\n    # why\n    && b\nENV P=/o:${PATH} \\\n  Q='1 2'\nFROM $B\nUSER 5\n"
    arguments, (first, second) = parse(text)
    assert (arguments, first.name, first.base, second.base) == ({"B": "x"}, "one", "x", "x")
    assert first.the("RUN").value.split() == ["a", "\\", "&&", "b"]
    found = variables_of(first)
    assert found["P"].startswith("/o:/usr/local/sbin:") and found["Q"] == "1 2" and second.the("USER").value == "5"
