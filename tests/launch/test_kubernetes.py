"""The manifest fits Kubernetes' schema, and its commands do what it promises: pods are hosts in namespaces here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch.job import Job
from launch.kubernetes import plan
from tests.hosts import TestHost, hosts
from tests.long import only_long
from tests.runs import make_shards, rows, write_recipe

STEPS = 150  # long enough for the first heartbeat
NAME = "first-run"

# What a pod sees of the machine: its own host name, all pods' names, and the ConfigMap where it is mounted.
POD = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /mnt
mkdir "$3"
cp "$2"/configmap/* "$3"
shift 3
exec "$@"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def recipe_for(path: Path, shards: Path) -> Path:
    return write_recipe(
        path,
        "simclr",
        shards=shards,
        data={"global_batch_size": 24, "num_workers": 1},
        schedule={"total": f"{STEPS} steps"},
        run={"timeout_minutes": 1.0},
    )


def manifest(job: Job, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the JobSet as Kubernetes reads them."""
    options = {"image": "example/scaler:1", "gpus": False, **options}
    launch = plan(job, **options)
    assert launch.files == {launch.command[-1]: launch.text}
    config, jobset = yaml.safe_load_all(launch.text)
    return config, jobset


def container_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return container


class Pod:
    """The container of one pod, with the variables that the manifest and the Job's controller give it."""

    def __init__(self, host: TestHost, index: int, container: dict[str, Any], folder: Path) -> None:
        self.host, self.container = host, container
        recipe_folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "recipe")
        enter = ["unshare", "--mount", "--uts", "sh", "-c", POD, "sh", f"{NAME}-node-0-{index}"]
        self.enter = [*enter, str(folder), recipe_folder]
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        root = str(Path(__file__).parents[2])
        self.environment = {"PATH": path, "PYTHONPATH": root, "JOB_COMPLETION_INDEX": str(index), **given}

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return self.host.popen(
                [*self.enter, *self.expand(self.container["command"])],
                env=self.environment, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def is_well(self, probe: str) -> bool:
        command = [*self.enter, *self.expand(self.container[probe]["exec"]["command"])]
        result = self.host.run(command, env=self.environment, cwd="/")
        assert result.returncode in (0, 1), result.stderr
        return result.returncode == 0

    def expand(self, words: list[str]) -> list[str]:
        """Kubernetes' own variables: $(NAME) where NAME is known, and $$ for $."""

        def value(match: re.Match[str]) -> str:
            text = match[0]
            return "$" if text == "$$" else self.environment.get(text[2:-1], text)

        return [re.sub(r"\$\$|\$\([^)]*\)", value, word) for word in words]


def wait_for(what: str, is_so: Any, *, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


@only_long
def test_an_evicted_pod_saves_and_the_run_ends_as_the_unbroken_one(shards: Path, tmp_path: Path) -> None:
    reference = recipe_for(tmp_path / "unbroken.yaml", shards)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "scaler.train", str(reference)], check=True, capture_output=True)

    runs, run_dir, log = tmp_path / "runs", tmp_path / "runs" / "first run", tmp_path / "pods.log"
    recipe = recipe_for(tmp_path / "recipe.yaml", shards)
    job = Job(str(recipe), overrides=(f"run.dir={run_dir}",), nodes=2)
    config, jobset = manifest(job, claim=[f"runs:{runs}", f"images:{shards}"])
    (tmp_path / "configmap").mkdir()
    for name, text in config["data"].items():
        (tmp_path / "configmap" / name).write_text(text)
    recipe.unlink()  # pods do not see it
    with hosts(2) as machines:
        names = [f"{m.address} {NAME}-node-0-{i}.{NAME} {NAME}-node-0-{i}\n" for i, m in enumerate(machines)]
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        pods = [Pod(machine, i, container_of(jobset), tmp_path) for i, machine in enumerate(machines)]
        assert not pods[0].is_well("startupProbe")

        processes = [pod.start(log) for pod in pods]
        metrics = run_dir / "metrics.jsonl"
        wait_for("a heartbeat", lambda: all(pod.is_well("startupProbe") for pod in pods))
        wait_for("step 12", lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 12)
        processes[1].send_signal(signal.SIGTERM)  # its machine is drained
        assert processes[1].wait(timeout=60) == 75, log.read_text()
        processes[0].send_signal(signal.SIGTERM)  # the JobSet deletes the other one
        assert processes[0].wait(timeout=60) == 75, log.read_text()
        assert 12 <= len(rows(run_dir)) < STEPS

        processes = [pod.start(log) for pod in reversed(pods)]  # in any order
        assert [process.wait(timeout=120) for process in processes] == [0, 0], log.read_text()
        assert "resuming from " in log.read_text()

        assert all(pod.is_well(probe) for pod in pods for probe in ("startupProbe", "livenessProbe"))
        (beat_of_0, beat_of_1) = sorted((run_dir / "heartbeat").glob("rank-*.json"))
        if f"{NAME}-node-0-0" not in beat_of_0.read_text():
            beat_of_0, beat_of_1 = beat_of_1, beat_of_0
        os.utime(beat_of_1, (time.time() - 900,) * 2)
        assert [pod.is_well("livenessProbe") for pod in pods] == [True, False]
        beat_of_0.unlink()
        assert [pod.is_well("livenessProbe") for pod in pods] == [False, False]
    assert rows(run_dir) == rows(tmp_path / "unbroken")
    assert len(rows(run_dir)) == STEPS


@only_long
def test_a_failure_before_the_training_is_none_to_repeat_for_free(shards: Path, tmp_path: Path) -> None:
    """exit.json of an earlier attempt asks for a restart, but this attempt comes to nothing."""
    recipe = recipe_for(tmp_path / "recipe.yaml", shards)
    (tmp_path / "first run").mkdir()
    (tmp_path / "first run" / "exit.json").write_text('{"reason": "signal", "requeue": true}\n')
    job = Job(str(recipe), overrides=(f"run.dir={tmp_path}/first run",), max_restarts=0)
    _, jobset = manifest(job, claim=[f"runs:{tmp_path}", f"images:{shards}"])
    (tmp_path / "configmap").mkdir()
    (tmp_path / "configmap" / "recipe.yaml").write_text("no recipe")
    with hosts(1) as (machine,):
        (tmp_path / "hosts").write_text(f"{machine.address} {NAME}-node-0-0.{NAME} {NAME}-node-0-0\n")
        pod = Pod(machine, 0, container_of(jobset), tmp_path)
        assert pod.start(tmp_path / "pod.log").wait(timeout=60) == 1
        assert "recipe.yaml holds no mapping" in (tmp_path / "pod.log").read_text()


def test_it_fits_the_schemas() -> None:
    overrides = ("run.dir=/runs/First run", "data.shards=/data/in1k", "data.val_shards=s3://bucket/val")
    job = Job("dinov2/demo", overrides=overrides, nodes=4, processes=8, min_nodes=2, environment={"NCCL_DEBUG": "INFO"})
    claims = ["runs:/runs", "images:/data"]
    config, jobset = manifest(job, claim=claims, gpus=True, cpus=96, memory="500Gi", namespace="ml", grace=600)
    kubernetes_validate.validate(config, "1.31", strict=True)
    template = jobset["spec"]["replicatedJobs"][0].pop("template")
    child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "first-run-node-0"}, **template}
    kubernetes_validate.validate(child, "1.31", strict=True)
    # JobSet has no schema in a package; checked against its CRD (August 2026) by hand.
    assert jobset == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "first-run", "namespace": "ml"},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": 3,
                "rules": [
                    {
                        "name": "stopped",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1}],
        },
    }
    spec = child["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert child["spec"]["completions"] == child["spec"]["parallelism"] == 4
    assert spec["terminationGracePeriodSeconds"] == 600
    assert {v["name"] for v in spec["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "500Gi"},
        "limits": {"memory": "500Gi", "nvidia.com/gpu": "8"},
    }
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert given["NCCL_DEBUG"] == "INFO" and given["OMP_NUM_THREADS"] == "12"
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == 570
    assert "--nnodes=2:4" in container["command"][-1]


def test_what_cannot_work_is_said() -> None:
    claims = ["runs:/runs", "images:/data"]
    good = ("run.dir=/runs/first", "data.shards=/data/in1k")

    def error(*overrides: str, **options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            manifest(Job("dinov2/demo", overrides=overrides), **{"claim": claims, **options})
        return str(caught.value)

    assert "run.dir=runs/first lies in no volume (/runs, /data)" in error("run.dir=runs/first", good[1])
    assert "data.shards=/elsewhere" in error(good[0], "data.shards=/elsewhere")
    assert "no volume (there are none)" in error(*good, claim=[])
    assert "--image" in error(*good, image=None)
    assert "'runs' is not CLAIM:/PATH" in error(*good, claim=["runs"])
    assert "'Run_1' cannot name" in error(*good, name="Run_1")
    assert "30 s of grace" in error(*good, grace=30)


def test_words_that_look_like_variables_stay() -> None:
    overrides = ("run.dir=/runs/$(HOME) $$x", "data.shards=/runs/s")
    _, jobset = manifest(Job("dinov2/demo", overrides=overrides), claim=["runs:/runs"], name="a")
    pod = Pod.__new__(Pod)
    pod.environment = {"HOME": "/root"}
    script = pod.expand(container_of(jobset)["command"])[-1].replace("exec python -m", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:2] == ["launch.attempt", "/runs/$(HOME) $$x"] and words[-2] == overrides[0]
