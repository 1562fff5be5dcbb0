"""Looks at the hosts of a job before it is started: whatever would stop it later, or let it hang, one line each.

report = check_hosts(job, recipe, kind="torchrun")
report.problems                   # ["node-2: torch 2.13.0, but node-1 has 2.15.0; install the same version"]

`scaler doctor` shows all findings of it, also what is right.
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
from functools import partial
from importlib import resources
from typing import Any

from launch.job import Job
from launch.judge import judge, real
from scaler.doctor.finding import Finding
from scaler.doctor.needs import Needs
from scaler.doctor.recipe import measure
from scaler.recipe import Recipe

_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "timm")
_SAME = "install the same version"
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
        findings: one for each thing on each host, problems and what is right.
        unchecked: what could not be looked at, and why.
    """

    hosts: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each error: the host, what is wrong, and what to do."""
        return [str(finding) for finding in self.findings if finding.level == "error"]

    def show(self) -> None:
        """Print it: problems on stderr as every command prints errors."""
        for finding in self.findings:
            if finding.level != "ok":
                print(f"{finding.level}: {finding}", file=sys.stderr)
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
    needs, _ = measure(recipe, processes=job.processes, ranks=job.nodes * job.processes)
    return look(job, needs, kind=kind, port=bool(job.hosts))


def look(job: Job, needs: Needs, *, kind: str = "torchrun", port: bool = True, written: int = 1 << 20) -> Report:
    """Look at the hosts of `job`, or at this machine, whatever it is that they are to run.

    Args:
        job: hosts, processes of each, port and environment.
        needs: what will be asked of each host.
        kind: the key of launch.KINDS that will start it.
        port: whether the first host must be free to listen at the job's port.
        written: bytes of the file that each writes where all must write.
    """
    names = [host.name for host in job.hosts] or [_HERE]
    report = Report(hosts=tuple(names))
    if needs.unchecked:
        report.unchecked.append(needs.unchecked)
    if job.hosts and kind == "deepspeed" and shutil.which("pdsh") is None:
        found = "pdsh is missing, with which deepspeed reaches hosts"
        report.findings.append(Finding("error", "pdsh", found, "apt-get install pdsh", host=_HERE))
    if len(names) > 1:
        report.unchecked.append(f"ports other than {job.port} and a random one; gloo and NCCL choose free ones")
    asked = {
        "folder": os.getcwd(),
        "packages": _PACKAGES,
        "shards": needs.shards,
        "shared": needs.folders,
        "bytes": written,
        "environment": dict(job.environment),
        "port": job.port if port else 0,
        "token": secrets.token_hex(8),
    }
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(names)) as pool:
        probes = list(
            pool.map(lambda i: _Probe(names[i], ssh=bool(job.hosts), asked={**asked, "number": i}), range(len(names)))
        )
        try:
            first = dict(zip(names, pool.map(lambda probe: probe.look(), probes), strict=True))
            report.findings.extend(p for probe in probes if (p := probe.problem) is not None)
            answers = {name: facts for name, facts in first.items() if facts is not None}
            report.findings.extend(_unlike(answers, job=job, kind=kind))
            any_gpus = any(facts.get("gpus") for facts in answers.values())
            for name, facts in answers.items():
                report.findings.extend(judge(name, facts, job=job, needs=needs, any_gpus=any_gpus))
            ready = [probe for probe in probes if answers.get(probe.name, {}).get("listener")]
            asks = [_others(probe.name, answers, job=job) for probe in ready]
            second = list(pool.map(lambda pair: pair[0].ask(pair[1]), zip(ready, asks, strict=True)))
            for probe, answer in zip(ready, second, strict=True):
                report.findings.extend(_apart(probe, answer, found=answers, job=job))
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
        self.problem: Finding | None = None
        self._process = subprocess.Popen(
            [*_SSH, name, shlex.join(command)] if ssh else command, stdin=pipe, stdout=pipe, stderr=pipe
        )

    def look(self) -> dict[str, Any] | None:
        """What the host is like by itself, with `clock`: its clock minus ours is between these two (seconds)."""
        facts = self.ask({"about": "alone"})
        asked = time.time()
        answer = self.ask({"about": "time"}) if facts is not None else None
        if facts is None or answer is None:
            return None
        return {**facts, "clock": (answer["time"] - time.time(), answer["time"] - asked)}

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a question about something. None: there is none, and `problem` says why."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its exit code says why
        if not select.select([self._process.stdout], [], [], _ANSWER_SECONDS)[0]:
            self._fail(f"no answer within {_ANSWER_SECONDS:.0f} s", "is it up, and is its disk?")
            return None
        line = self._process.stdout.readline()
        if not line:
            self._fail(*self._failure())
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the probe clean up and end."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _fail(self, found: str, fix: str) -> None:
        self.problem = Finding("error", "host", found, fix, host=self.name)

    def _failure(self) -> tuple[str, str]:
        """Why there was no answer, and what to do."""
        _, errors = self._process.communicate()
        code, last = self._process.returncode, (errors.decode().strip().splitlines() or ["without a word"])[-1]
        if code == _SSH_FAILED and ("Permission denied" in last or "verification failed" in last):
            return f"no ssh without a password ({last})", f"try `ssh {self.name} true`, then ssh-copy-id {self.name}"
        if code == _SSH_FAILED:
            return f"no ssh ({last})", "is it up, and is its name right?"
        if code in (126, 127):
            return f"no {sys.executable}", "make the same environment at the same path there"
        return f"{sys.executable} ended with exit code {code} ({last})", ""


def _unlike(found: dict[str, dict[str, Any]], *, job: Job, kind: str) -> Iterator[Finding]:
    """Where hosts differ from the first."""
    complete = {name: facts for name, facts in found.items() if "listener" in facts}
    if not complete:
        return
    first, reference = next(iter(complete.items()))
    needed = {"torch", *(["accelerate"] if kind == "accelerate" else [])}
    needed |= {"deepspeed"} if kind == "deepspeed" or job.strategy.startswith("zero") else set()
    for name, facts in complete.items():
        error = partial(Finding, "error", host=name)
        if facts["python"] != reference["python"]:
            yield error("Python", f"Python {facts['python']}, but {first} has {reference['python']}", _SAME)
        for package, version in facts["packages"].items():
            if version is None and package in needed:
                yield error(package, f"{package} is missing", f"install it for {sys.executable}")
            elif version != reference["packages"][package] and reference["packages"][package] is not None:
                has = f"{package} {version or 'is missing'}, but {first} has {reference['packages'][package]}"
                yield error(package, has, _SAME)
        if facts["code"] is None:
            yield error("scaler", f"{sys.executable} finds no scaler", "install it there")
        elif reference["code"] not in (None, facts["code"]):
            yield error("scaler", f"another version of scaler's own code than on {first}", "install the same one")
        sha256 = facts["index"].get("sha256")
        if sha256 is not None and reference["index"].get("sha256") not in (None, sha256):
            fix = "copy them, or share the folder"
            yield error("shards", f"other shards than on {first} (index.json differs)", fix)
        (low, high), (first_low, first_high) = facts["clock"], reference["clock"]
        if max(low - first_high, first_low - high) > _CLOCK_SECONDS:
            skew = (low + high - first_low - first_high) / 2
            yield error("clock", f"its clock is {skew:+.1f} s from {first}'s", "run a time service (chrony) on both")
        elif name != first:
            yield Finding("ok", "clock", f"at most {_CLOCK_SECONDS:.0f} s from {first}'s", host=name)


def _others(name: str, found: dict[str, dict[str, Any]], *, job: Job) -> dict[str, Any]:
    """What `name` is asked to reach and to see: the meeting point, the next host by its name and at the address that
    its gloo offers, and everybody's files."""
    ready = [other for other, facts in found.items() if "listener" in facts]
    after = ready[(ready.index(name) + 1) % len(ready)]
    connect = []
    if after != name:
        offered, listener = found[after]["network"]["offered"], found[after]["listener"]
        connect.append((after, after, listener))
        if offered and not offered.startswith("127."):
            connect.append((after, offered, listener))
    if job.hosts and (first := job.hosts[0].name) in ready and found[first]["port"] is None:
        connect.append((first, first, job.port))
    written = [place["path"] for other in ready for place in found[other]["written"] if place["path"]]
    return {"about": "others", "connect": connect, "written": written}


def _apart(
    probe: _Probe, answer: dict[str, Any] | None, *, found: dict[str, dict[str, Any]], job: Job
) -> Iterator[Finding]:
    """What a host cannot reach or see of the others."""
    if answer is None:
        if probe.problem is not None:
            yield probe.problem
        return
    error = partial(Finding, "error", host=probe.name)
    by_name = {name for name, address, _, _ in answer["unreached"] if address == name}
    for name, address, port, reason in answer["unreached"]:
        network = found[name]["network"]
        if address == name:
            fix = f"choose another with --port, or open {port}" if port == job.port else "open the ports between them"
            yield error("network", f"cannot reach {name}, port {port}: {reason}", fix)
        elif name not in by_name:
            chosen = f"GLOO_SOCKET_IFNAME={network['gloo'][0]}" if network["gloo"] else "its own name"
            better = [i for i, other in real(network["interfaces"]).items() if other != address] or ["INTERFACE"]
            fix = f"--env GLOO_SOCKET_IFNAME={better[0]}"
            yield error("network", f"cannot reach {name} at {address}, which gloo offers by {chosen}: {reason}", fix)
    for name, facts in found.items():
        for place in facts.get("written", []):
            if place["path"] in answer["unseen"]:
                yield error(
                    "shared folder",
                    f"does not see what {name} writes to {place['folder']}",
                    "all hosts need one run.dir (and checkpoint.dir), on a shared file system",
                )
