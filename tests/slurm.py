"""A real Slurm cluster of several hosts on one machine, for tests of the job file.

    with slurm(2) as cluster:
        job = cluster.submit(Path("first.sbatch"), cwd=folder)
        cluster.wait(job, "COMPLETED")

Every host (tests.hosts) is a node with one processor, and the first one also runs the controller. There are two
partitions: `batch`, the default, and `urgent`, whose jobs push those of `batch` out after a SIGTERM and time to save.
The daemons end with their hosts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import TestHost, hosts
from tests.packages import PATH, install

_PROGRAMS = {"munged": "munge"} | dict.fromkeys(("slurmctld", "slurmd", "sbatch"), "slurm-wlm")

# cred_expire: a requeued job waits so many seconds until it starts again; less than 5 means 120, the default.
_CONFIG = """
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={nodes} CPUs=1 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=CANCEL GraceTime=60 MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        host: on which its commands are run.
        config: its slurm.conf.
    """

    host: TestHost
    config: Path

    def run(self, command: Sequence[str], *, cwd: Path = Path("/")) -> str:
        """What a command of Slurm's prints; it must succeed."""
        result = self.host.run(command, cwd=cwd, env=_environment(self.config))
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def submit(self, file: Path, *, cwd: Path) -> str:
        """Submit a job file from `cwd`; the job's number."""
        return self.run(["sbatch", "--parsable", str(file)], cwd=cwd).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, as JobState or Restarts."""
        words = self.run(["scontrol", "show", "job", "--oneliner", job]).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *states: str, timeout: float = 120) -> str:
        """Wait until the job is in one of `states`, and say which."""
        deadline = time.monotonic() + timeout
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}: {self.run(['scontrol', 'show', 'job', job])}"
            time.sleep(0.3)
        return state


@contextlib.contextmanager
def slurm(num_hosts: int) -> Iterator[Cluster]:
    """Bring up a cluster and take it down in the end.

    Skips the test, with the reason, where there can be no hosts, or Slurm is missing and cannot be had.
    """
    with hosts(num_hosts) as machines, tempfile.TemporaryDirectory(prefix="slurm-") as name:
        if (reason := install(_PROGRAMS)) is not None:
            pytest.skip(reason)
        folder = Path(name)
        config, key = folder / "slurm.conf", folder / "munge.key"
        names = [machine.name for machine in machines]
        config.write_text(_CONFIG.format(first=names[0], nodes=",".join(names), folder=folder))
        (folder / "state").mkdir()
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        with (folder / "daemons.log").open("w") as log, contextlib.ExitStack() as stack:
            options = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "env": _environment(config)}
            for machine in machines:
                stack.callback(machine.lose)  # before the folder goes
                _start_munge(machine, key, options)
            machines[0].popen(["slurmctld", "-D", "-f", str(config)], **options)
            for machine in machines:
                machine.popen(["slurmd", "-D", "-f", str(config), "-N", machine.name], **options)
            cluster = Cluster(host=machines[0], config=config)
            _wait_until_idle(cluster, len(names), folder)
            yield cluster


def _environment(config: Path) -> dict[str, str]:
    return {**os.environ, "PATH": PATH, "SLURM_CONF": str(config)}


def _start_munge(machine: TestHost, key: Path, options: dict[str, object]) -> None:
    files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    places = [f"--{option}=/run/{name}" for option, name in files.items()]  # a folder of the host's own
    machine.popen(["munged", "--foreground", "--force", f"--key-file={key}", *places], **options)


def _wait_until_idle(cluster: Cluster, num_nodes: int, folder: Path) -> None:
    deadline = time.monotonic() + 60
    command = ["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%t"]
    while True:
        shown = cluster.host.run(command, env=_environment(cluster.config))
        if shown.stdout.split() == ["idle"] * num_nodes:
            return
        logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, f"the cluster does not come up: {shown.stdout}{shown.stderr}{logs}"
        time.sleep(0.3)
