"""A manifest for Kubernetes whose pods save before they leave, and start again together.

    job = Job("dinov2/vitl16_in1k", overrides=("run.dir=/runs/first", "data.shards=/data/in1k"), nodes=4, processes=8)
    launch = plan(job, image="example/scaler:1", claim=["runs:/runs", "images:/data"])
    print(launch.text)

It is a JobSet: one Indexed Job with a pod for each machine, which meet at pod 0 under its stable name. A plain Job
replaces single pods, but a training must start again as a whole, which a JobSet does. It needs one small controller
(0.6 or newer, on Kubernetes 1.26 or newer); PyTorchJob needs Kubeflow's operator, whose successor builds on JobSet.

Eviction, preemption and `kubectl delete pod` send SIGTERM. `launch.attempt`, process 1 of the container, passes it to
torchrun, the ranks agree on a step and save, and the pod ends with exit code 75, for which the grace period leaves time
(so there is no preStop hook). Exit code 75, or a pod that Kubernetes itself disrupted, starts all pods again and is not
counted; any other failure is, up to `max_restarts` (and torchrun in a pod has restarted its processes as often before).

The probes look at the heartbeat files that each rank of this pod writes, so that a pod counts as started when its ranks
have met, and is replaced when one of them is gone or frozen; a rank that merely makes no progress is found and named by
the training itself.

The recipe travels in a ConfigMap, so that exactly what was checked here is what runs there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from launch.attempt import START_AGAIN
from launch.job import Job, Launch
from scaler.recipe import find_recipe, load_recipe

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = 50  # of a host name's 63 characters, the rest being -node-0-NUMBER
_RECIPE = PurePosixPath("/mnt/recipe/recipe.yaml")
_SHUTDOWN_SECONDS = 30  # of the grace period, for torchrun's own end and what launch.attempt waits for
_MEETING_SECONDS = 1800  # a pod may have to wait for others that pull their image, or for machines
_HEARTBEAT_MINUTES = 5  # the files are written every 5 s; restarts within the pod take a minute or two

# Pod 0 holds the rendezvous. torchrun would guess that from names, which DNS may not know yet.
_START = """\
case "$JOB_COMPLETION_INDEX" in 0) first=1 ;; *) first=0 ;; esac
export PET_RDZV_CONF=is_host=$first,join_timeout={meeting},read_timeout={meeting}
export PET_LOCAL_ADDR={name}-node-0-$JOB_COMPLETION_INDEX.{name}
exec {command}
"""

_PROBE = """\
mine="\\"host\\": \\"`uname -n`\\""
fresh=`find {folder} -name 'rank-*.json' -mmin -{minutes} -exec grep -q "$mine" {{}} \\; -print | wc -l`
test "$fresh" -ge {processes}
"""

_HEADER = """\
# A training on {nodes} pods of {processes} processes: {recipe}
#
# kubectl apply -f {file}        needs the JobSet controller (jobset.sigs.k8s.io)
# kubectl get jobset {name}
#
# A pod that is evicted saves a checkpoint within terminationGracePeriodSeconds and ends with {again}; then all pods
# start again and go on from there. Such restarts are not counted, failures are (maxRestarts).
"""


def plan(
    job: Job,
    *,
    image: str | None = None,
    claim: Sequence[str] = (),
    name: str | None = None,
    namespace: str | None = None,
    cpus: int | None = None,
    memory: str | None = None,
    gpus: bool = True,
    grace: int = 300,
) -> Launch:
    """The manifest.

    Args:
        job: what to train; paths in it are those that the pods see.
        image: a container image in which this package is installed; there is no default.
        claim: volumes for the run and the shards, each a PersistentVolumeClaim and where to mount it, as `runs:/runs`;
            with several nodes they must be mountable by many (ReadWriteMany).
        name: of the JobSet; None: that of the run directory.
        namespace: None: kubectl's current one.
        cpus: of each pod; None: no request.
        memory: of each pod as Kubernetes writes it, shared memory included; None: no request.
        gpus: ask for one GPU per process.
        grace: seconds between SIGTERM and SIGKILL, in which the checkpoint must be written.

    Raises:
        ValueError: the recipe is wrong, a name is none, or the pods could not see the run or the shards.
    """
    if image is None:
        raise ValueError("the pods need a container image in which scaler is installed; name it with --image")
    recipe = load_recipe(job.recipe, overrides=job.overrides)
    run_dir = PurePosixPath(recipe.run.dir)
    mounts = dict(map(_claim, claim))
    for key, path in _paths(recipe).items():
        if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts.values()):
            raise ValueError(
                f"{key}={path} lies in no volume ({', '.join(mounts.values()) or 'there are none'}), so that the pods "
                f"cannot share it; mount one with --claim CLAIM:/PATH and write {key}=/PATH/…"
            )
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{name!r} cannot name a JobSet, which has lower-case letters, digits and '-' between them, "
            f"{_LONGEST_NAME} characters at most; give another with --name"
        )
    if grace <= _SHUTDOWN_SECONDS:
        raise ValueError(f"{grace} s of grace leave no time for a checkpoint; give more than {_SHUTDOWN_SECONDS}")

    container = {
        "name": "train",
        "image": image,
        "command": ["/bin/sh", "-c", _start(job, name=name, run_dir=run_dir)],
        "env": [{"name": key, "value": value} for key, value in _environment(job, cpus=cpus, grace=grace).items()],
        "resources": _resources(job, cpus=cpus, memory=memory, gpus=gpus),
        "startupProbe": _probe(job, run_dir, seconds=10, failures=_MEETING_SECONDS // 10 + 30),
        "livenessProbe": _probe(job, run_dir, seconds=60, failures=3),
        "volumeMounts": [
            {"name": "recipe", "mountPath": str(_RECIPE.parent), "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": volume, "mountPath": mount} for volume, mount in mounts.items()),
        ],
    }
    pod = {
        "restartPolicy": "Never",  # the pod failure policy asks for it; the JobSet starts pods again
        "terminationGracePeriodSeconds": grace,
        "containers": [container],
        "volumes": [
            {"name": "recipe", "configMap": {"name": f"{name}-recipe"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # through which loader workers hand over batches
            *({"name": volume, "persistentVolumeClaim": {"claimName": volume}} for volume in mounts),
        ],
    }
    children = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [START_AGAIN]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(name, namespace),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "stopped",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": children}}],
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{name}-recipe", namespace),
        "data": {_RECIPE.name: find_recipe(job.recipe).read_text()},
    }
    file = f"{name}.yaml"
    header = _HEADER.format(
        nodes=job.nodes, processes=job.processes, recipe=job.recipe, file=file, name=name, again=START_AGAIN
    )
    text = header + yaml.dump_all([config, jobset], Dumper=_Dumper, sort_keys=False, width=120)
    return Launch(text=text, command=["kubectl", "apply", "-f", file], files={file: text})


class _Dumper(yaml.SafeDumper):
    """Scripts and recipes as blocks, not as quoted lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _claim(text: str) -> tuple[str, str]:
    claim, _, path = text.partition(":")
    if not _NAME.fullmatch(claim) or not path.startswith("/") or path == "/":
        raise ValueError(f"--claim {text!r} is not CLAIM:/PATH, for example runs:/runs")
    return claim, path


def _paths(recipe: Any) -> dict[str, str]:
    """What all pods must see, by its key in the recipe; URLs are seen from anywhere."""
    found = {
        "run.dir": recipe.run.dir,
        "checkpoint.dir": recipe.checkpoint.dir,
        "data.shards": recipe.data.shards if recipe.data.reader == "indexed" else None,
        "data.val_shards": recipe.data.val_shards,
    }
    return {key: path for key, path in found.items() if path is not None and "://" not in path}


def _start(job: Job, *, name: str, run_dir: PurePosixPath) -> str:
    """The script of every pod."""
    nodes = job.nodes if job.min_nodes is None else f"{job.min_nodes}:{job.nodes}"
    attempt = ["python", "-m", "launch.attempt", str(run_dir)]
    torchrun = ["python", "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={job.processes}"]
    meet = ["--rdzv-backend=c10d", f"--rdzv-id={name}", f"--rdzv-endpoint={name}-node-0-0.{name}:{job.port}"]
    restarts = [f"--max-restarts={job.max_restarts}"]
    train = replace(job, recipe=str(_RECIPE)).train
    lines = [shlex.join(words) for words in (attempt, torchrun, meet, [*restarts, *train])]
    return _literal(_START.format(meeting=_MEETING_SECONDS, name=name, command=" \\\n  ".join(lines)))


def _environment(job: Job, *, cpus: int | None, grace: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, (cpus or 1) // job.processes)),  # of a pod's limit on CPUs Python knows nothing
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace - _SHUTDOWN_SECONDS),  # torchrun would kill after 30 s
        **{name: _literal(value) for name, value in job.environment.items()},
    }


def _literal(text: str) -> str:
    """`text` so that Kubernetes leaves it as it is: for itself $(NAME) is a variable, and $$ a dollar."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _resources(job: Job, *, cpus: int | None, memory: str | None, gpus: bool) -> dict[str, Any]:
    requests = {"cpu": cpus, "memory": memory}
    limits = {"memory": memory, "nvidia.com/gpu": job.processes if gpus else None}
    given = {
        kind: {key: str(value) for key, value in values.items() if value is not None}
        for kind, values in (("requests", requests), ("limits", limits))
    }
    return {kind: values for kind, values in given.items() if values}


def _probe(job: Job, run_dir: PurePosixPath, *, seconds: int, failures: int) -> dict[str, Any]:
    folder = shlex.quote(str(run_dir / "heartbeat"))
    script = _PROBE.format(folder=folder, minutes=_HEARTBEAT_MINUTES, processes=job.processes)
    return {
        "exec": {"command": ["/bin/sh", "-c", _literal(script)]},
        "periodSeconds": seconds,
        "timeoutSeconds": 30 if seconds > 30 else seconds,
        "failureThreshold": failures,
    }


def _metadata(name: str, namespace: str | None) -> dict[str, str]:
    return {"name": name} if namespace is None else {"name": name, "namespace": namespace}
