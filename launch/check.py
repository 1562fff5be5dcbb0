"""Looks at the hosts of a job before it is started: whatever would stop it later, or let it hang, one line each.

report = check_hosts(job, recipe, kind="torchrun")
report.problems                   # ["node-2: torch 2.13.0, but node-1 has 2.15.0; install the same version"]
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from launch.job import Job
from scaler.recipe import Recipe
from shards.places import without_secrets

_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "timm")
_CLOCK_SECONDS = 2.0
_ANSWER_SECONDS = 60.0
_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
_SSH_FAILED = 255  # ssh's own exit code
_SCHEDULED = ("slurm", "kubernetes")
_HERE = "this machine"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        hosts: the hosts that were looked at.
        problems: one line each: the host, what is wrong, and what to do.
        unchecked: what could not be looked at, and why.
    """

    hosts: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print it: problems on stderr as every command prints errors."""
        for problem in self.problems:
            print(f"error: {problem}", file=sys.stderr)
        for line in self.unchecked:
            print(f"# not checked: {line}")
        if self.hosts and not self.problems:
            print(f"# checked: {', '.join(self.hosts)}")


def check_hosts(job: Job, recipe: Recipe, *, kind: str) -> Report:
    """Look at every host of `job` at once, over ssh; without hosts at this machine.

    Args:
        job: the job.
        recipe: its recipe, checked.
        kind: the key of launch.KINDS that will start it.
    """
    if kind in _SCHEDULED:
        return Report(unchecked=["the machines, which the scheduler will choose"])
    if job.nodes > 1 and not job.hosts:
        return Report(unchecked=[f"the {job.nodes} machines, whose names are not known; give --hosts"])
    names = [host.name for host in job.hosts] or [_HERE]
    report = Report(hosts=tuple(names))
    shards, folders = _shards(recipe), [recipe.run.dir, recipe.checkpoint.dir or recipe.run.dir]
    if shards is None:
        report.unchecked.append(
            f"data.shards on the hosts, since {without_secrets(recipe.data.shards)} is "
            + ("a stream" if recipe.data.reader == "stream" else "remote")
        )
    if job.hosts and kind == "deepspeed" and shutil.which("pdsh") is None:
        report.problems.append(f"{_HERE}: pdsh is missing, with which deepspeed reaches hosts; apt-get install pdsh")
    if len(names) > 1:
        report.unchecked.append(f"ports other than {job.port} and a random one; gloo and NCCL choose free ones")
    asked = {
        "folder": os.getcwd(),
        "packages": _PACKAGES,
        "shards": shards,
        "shared": sorted({place for folder in folders if (place := _local(folder)) is not None}),
        "port": job.port if job.hosts else 0,
        "token": secrets.token_hex(8),
    }
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(names)) as pool:
        probes = list(
            pool.map(lambda i: _Probe(names[i], ssh=bool(job.hosts), asked={**asked, "number": i}), range(len(names)))
        )
        try:
            first = dict(zip(names, pool.map(lambda probe: probe.ask({}), probes), strict=True))
            report.problems.extend(p for probe in probes if (p := probe.problem) is not None)
            found = {name: facts for name, facts in first.items() if facts is not None}
            report.problems.extend(_unlike(found, job=job, kind=kind))
            report.problems.extend(_unfit(found, job=job, recipe=recipe))
            ready = [probe for probe in probes if found.get(probe.name, {}).get("listener")]
            asks = [_others(probe.name, found, job=job) for probe in ready]
            second = list(pool.map(lambda pair: pair[0].ask(pair[1]), zip(ready, asks, strict=True)))
            for probe, answer in zip(ready, second, strict=True):
                report.problems.extend(_apart(probe, answer, found=found, job=job))
        finally:
            for probe in probes:
                probe.close()
    return report


class _Probe:
    """The conversation with `launch.probe` on one host."""

    def __init__(self, name: str, *, ssh: bool, asked: dict[str, Any]) -> None:
        source = resources.files("launch").joinpath("probe.py").read_text()
        command = [sys.executable, "-c", source, json.dumps(asked)]
        pipe = subprocess.PIPE
        self.name = name
        self.problem: str | None = None
        self._process = subprocess.Popen(
            [*_SSH, name, shlex.join(command)] if ssh else command, stdin=pipe, stdout=pipe, stderr=pipe
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, with `skew`: the host's clock minus ours, where it tells the time. None: `problem` says why."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its exit code says why
        if not select.select([self._process.stdout], [], [], _ANSWER_SECONDS)[0]:
            self.problem = f"{self.name}: no answer within {_ANSWER_SECONDS:.0f} s; is it up, and is its disk?"
            return None
        line = self._process.stdout.readline()
        if not line:
            self.problem = f"{self.name}: {self._failure()}"
            return None
        answer: dict[str, Any] = json.loads(line)
        return {**answer, "skew": answer["time"] - time.time()} if "time" in answer else answer

    def close(self) -> None:
        """Let the probe clean up and end."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _failure(self) -> str:
        _, errors = self._process.communicate()
        code, last = self._process.returncode, (errors.decode().strip().splitlines() or ["without a word"])[-1]
        if code == _SSH_FAILED and ("Permission denied" in last or "verification failed" in last):
            return f"no ssh without a password ({last}); try `ssh {self.name} true`, then ssh-copy-id {self.name}"
        if code == _SSH_FAILED:
            return f"no ssh ({last}); is it up, and is its name right?"
        if code in (126, 127):
            return f"no {sys.executable}; make the same environment at the same path there"
        return f"{sys.executable} ended with exit code {code} ({last})"


def _unlike(found: dict[str, dict[str, Any]], *, job: Job, kind: str) -> Iterator[str]:
    """Where hosts differ from the first."""
    complete = {name: facts for name, facts in found.items() if "listener" in facts}
    if not complete:
        return
    first, reference = next(iter(complete.items()))
    needed = {"torch", *(["accelerate"] if kind == "accelerate" else [])}
    needed |= {"deepspeed"} if kind == "deepspeed" or job.strategy.startswith("zero") else set()
    for name, facts in complete.items():
        if facts["python"] != reference["python"]:
            yield f"{name}: Python {facts['python']}, but {first} has {reference['python']}; install the same version"
        for package, version in facts["packages"].items():
            if version is None and package in needed:
                yield f"{name}: {package} is missing; install it for {sys.executable}"
            elif version != reference["packages"][package] and reference["packages"][package] is not None:
                yield (
                    f"{name}: {package} {version or 'is missing'}, but {first} has {reference['packages'][package]}; "
                    "install the same version"
                )
        if facts["code"] is None:
            yield f"{name}: {sys.executable} finds no scaler; install it there"
        elif reference["code"] not in (None, facts["code"]):
            yield f"{name}: another version of scaler's own code than on {first}; install the same one"
        if facts["index"] is not None and reference["index"] not in (None, facts["index"]):
            yield f"{name}: other shards than on {first} (index.json differs); copy them, or share the folder"
        if abs(skew := facts["skew"] - reference["skew"]) > _CLOCK_SECONDS:
            yield f"{name}: its clock is {skew:+.1f} s from {first}'s; run a time service (chrony) on both"


def _unfit(found: dict[str, dict[str, Any]], *, job: Job, recipe: Recipe) -> Iterator[str]:
    """What is wrong with each host by itself."""
    gpus = any(facts.get("gpus") for facts in found.values())
    for name, facts in found.items():
        if "listener" not in facts:
            yield f"{name}: {os.getcwd()}: {facts['folder']}; run this where every host has the same folder"
            continue
        if _shards(recipe) is not None and facts["index"] is None:
            yield f"{name}: data.shards: no {recipe.data.shards}/index.json there; copy the shards, or share the folder"
        for place in facts["written"]:
            if place["error"] is not None:
                yield f"{name}: cannot write to {place['folder']}: {place['error']}; change run.dir or its rights"
        if facts["port"] is not None:
            yield f"{name}: port {job.port}: {facts['port']}; end what listens there, or choose another with --port"
        if gpus and facts["gpus"] < job.processes:
            yield f"{name}: {facts['gpus']} GPUs for {job.processes} processes; lower --processes or its slots"
        if facts["loopback"] and job.nodes > 1 and "GLOO_SOCKET_IFNAME" not in job.environment:
            yield (
                f"{name}: its own name means loopback, which gloo would offer to the others, who hang; add "
                f"--env GLOO_SOCKET_IFNAME={facts['loopback'][0]}, or mend /etc/hosts there"
            )


def _others(name: str, found: dict[str, dict[str, Any]], *, job: Job) -> dict[str, Any]:
    """What `name` is asked to reach and to see: the meeting point, the next host's port, and everybody's files."""
    ready = [other for other, facts in found.items() if "listener" in facts]
    after = ready[(ready.index(name) + 1) % len(ready)]
    connect = [(after, found[after]["listener"])] if after != name else []
    if job.hosts and (first := job.hosts[0].name) in ready and found[first]["port"] is None:
        connect.append((first, job.port))
    written = [place["path"] for other in ready for place in found[other]["written"] if place["path"]]
    return {"connect": connect, "written": written}


def _apart(
    probe: _Probe, answer: dict[str, Any] | None, *, found: dict[str, dict[str, Any]], job: Job
) -> Iterator[str]:
    """What a host cannot reach or see of the others."""
    if answer is None:
        if probe.problem is not None:
            yield probe.problem
        return
    for name, port, reason in answer["unreached"]:
        advice = f"choose another with --port, or open {port}" if port == job.port else "open the ports between them"
        yield f"{probe.name}: cannot reach {name}, port {port}: {reason}; {advice}"
    for name, facts in found.items():
        for place in facts.get("written", []):
            if place["path"] in answer["unseen"]:
                yield (
                    f"{probe.name}: does not see what {name} writes to {place['folder']}; all hosts need one run.dir "
                    "(and checkpoint.dir), on a shared file system"
                )


def _shards(recipe: Recipe) -> str | None:
    """The local folder with the index, if that is where the recipe's shards are."""
    return _local(recipe.data.shards) if recipe.data.reader == "indexed" else None


def _local(path: str) -> str | None:
    """`path` unless it is a URL."""
    return None if "://" in path else path
