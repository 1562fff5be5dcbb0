"""`scaler launch` as a user meets it: what it prints, its exit codes, and the last word on wrong use."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from tests.scaler.test_cli import scaler


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a hostfile and shards (their index alone), which is the current one."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/index.json").write_text("{}")
    (tmp_path / "hostfile").write_text("node-1 slots=4\nnode-2 slots=4\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_host_has_its_command(place: Path) -> None:
    said = scaler("launch", "torchrun", "dinov2/demo", "data.shards=a b", "--hosts", "hostfile", "--processes", 2)
    assert said.returncode == 0 and said.stderr == ""
    first, one, second, two = said.stdout.splitlines()
    assert (first, second) == ("# node-1", "# node-2")
    for line in (one, two):
        folder, command = line.split(" && ")
        assert folder == f"cd {place}"
        assert shlex.split(command)[-2:] == ["dinov2/demo", "data.shards=a b"] and "--nproc-per-node 2" in command


def test_json_says_the_same(place: Path) -> None:
    words = ["launch", "accelerate", "dinov2/demo", "--hosts", "hostfile", "strategy.name=zero2", "--env", "A=1"]
    facts = json.loads(scaler(*words, "--json").stdout)
    assert facts["text"] == scaler(*words).stdout and facts["problems"] is None
    assert list(facts["hosts"]) == ["node-1", "node-2"] and "A=1" in facts["hosts"]["node-1"]


def test_looking_alone(place: Path) -> None:
    good = scaler("launch", "torchrun", "dinov2/demo", "data.shards=shards", "--check")
    assert (good.returncode, good.stdout, good.stderr) == (0, "# checked: this machine\n", "")
    bad = scaler("launch", "torchrun", "dinov2/demo", "data.shards=nowhere", "--check")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("error: this machine: data.shards: no nowhere/index.json there;")
    facts = json.loads(scaler("launch", "torchrun", "dinov2/demo", "data.shards=nowhere", "--check", "--json").stdout)
    assert [f"error: {problem}\n" for problem in facts["problems"]] == [bad.stderr]


def test_nothing_runs_where_there_is_a_problem(place: Path) -> None:
    said = scaler("launch", "torchrun", "dinov2/demo", "data.shards=nowhere", f"run.dir={place}/run", "--run")
    assert said.returncode == 1 and "no nowhere/index.json" in said.stderr
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torchrum", "dinov2/demo"], "no kind of launch 'torchrum'; did you mean 'torchrun'?"),
        (["torchrun", "dinov2/dem"], "no recipe 'dinov2/dem'"),
        (["torchrun", "dinov2/demo", "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["torchrun", "dinov2/demo", "--hosts", "hostfile", "--nodes", "3"], "3 nodes, but the hostfile names 2"),
        (["torchrun", "dinov2/demo", "--env", "A"], "--env 'A' is not NAME=VALUE"),
        (["torchrun", "dinov2/demo", "--json", "--run"], "leave out --run"),
        (["deepspeed", "dinov2/demo", "--max-restarts", "2"], "starts no dead process again"),
        (["slurm", "dinov2/demo", "--hosts", "hostfile"], "give --nodes instead of --hosts"),
        (["slurm", "dinov2/demo", "--image", "a"], "slurm takes no --image"),
        (["kubernetes", "dinov2/demo"], "name it with --image"),
        (["deepspeed", "dinov2/demo", "--nodes", "2"], "give a hostfile with --hosts"),
    ],
)
def test_wrong_use(place: Path, words: list[str], message: str) -> None:
    said = scaler("launch", *words)
    assert said.returncode == 2 and said.stdout == ""
    (line,) = said.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_machines_without_names_are_printed_and_not_run(place: Path) -> None:
    words = ["launch", "torchrun", "dinov2/demo", "data.shards=shards", "--nodes", 2]
    assert "HOST_1" in scaler(*words).stdout
    said = scaler(*words, "--run")
    assert said.returncode == 1 and "--run needs the names of the 2 machines" in said.stderr


def test_schedulers_get_a_file(place: Path) -> None:
    said = scaler("launch", "slurm", "dinov2/demo", "--no-gpus", "--time", "10", "--sbatch", "qos=high", "--grace", 60)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert {"#SBATCH --time=10", "#SBATCH --qos=high", "#SBATCH --signal=USR1@60"} <= set(lines)
    assert "gpus" not in said.stdout
    mounted = ["--image", "a", "--claim", "runs:/runs", "run.dir=/runs/first", "data.shards=/runs/shards"]
    said = scaler("launch", "kubernetes", "dinov2/demo", *mounted, "--namespace", "ml")
    _, jobset = yaml.safe_load_all(said.stdout)
    assert (jobset["kind"], jobset["metadata"]) == ("JobSet", {"name": "first", "namespace": "ml"})


def test_help_has_an_example() -> None:
    said = scaler("launch", "--help")
    assert said.returncode == 0 and "Example: scaler launch torchrun" in said.stdout
