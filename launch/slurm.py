"""A job file for Slurm that survives time limits and preemption.

    launch = plan(Job(recipe="dinov2/vitl16_in1k", nodes=4, processes=8), time="12:00:00", partition="gpu")
    print(launch.text)

One task a node runs torchrun; the nodes meet at the first one. Slurm sends SIGUSR1 to all processes of the step before
the time limit, and SIGTERM when it preempts the job: either makes the training agree on a step, save and write
RUN/exit.json, upon which the job puts itself back into the queue under the same number and log file.

The job is put back only if RUN/exit.json was written by this very attempt and asks for it. So nothing loops: a failure
(torchrun has used up its restarts, or nothing was written), a finished run and `scancel` end the job. Where Slurm puts
it back by itself (a lost node, PreemptMode=REQUEUE, `scontrol requeue`), the script stays out of the way.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.job import Job, Launch
from launch.local import SIGNALS
from scaler.recipe import load_recipe

_MEETING = "join_timeout=900,read_timeout=900"  # torchrun itself waits for 60 s until the first node has started
_PORTS = 1000  # from the job's port on, chosen by the number of the job: two may share their first node


def plan(
    job: Job,
    *,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    cpus: int | None = None,
    memory: str | None = None,
    gpus: bool = True,
    grace: int = 120,
    sbatch: Sequence[str] = (),
) -> Launch:
    """The job file.

    Args:
        job: what to train. Its hosts are Slurm's to choose, and its port is the first of those that jobs share out.
        time: limit as Slurm writes it; None: the partition's.
        partition: None: the default one.
        account: to be charged; None: the user's default.
        cpus: on each node; None: as many as Slurm gives.
        memory: on each node, as Slurm writes it; None: as much as Slurm gives.
        gpus: ask for one GPU per process.
        grace: seconds between the first signal and the time limit, in which the checkpoint must be written.
        sbatch: more options of sbatch, without the dashes, as `qos=high`.

    Raises:
        ValueError: the recipe is wrong, or an option is no option.
    """
    run_dir = load_recipe(job.recipe, overrides=job.overrides).run.dir
    name = re.sub(r"[^\w.-]+", "-", Path(run_dir).name) or "scaler"
    if job.port + _PORTS > 65536:
        raise ValueError(f"port {job.port} leaves no room for {_PORTS} jobs; give one up to {65536 - _PORTS}")
    wanted = {
        "job-name": name,
        "nodes": job.nodes if job.min_nodes is None else f"{job.min_nodes}-{job.nodes}",
        "ntasks-per-node": 1,
        "gpus-per-node": job.processes if gpus else None,
        "cpus-per-task": cpus,
        "mem": memory,
        "time": time,
        "partition": partition,
        "account": account,
        "signal": f"USR1@{grace}",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    lines = [f"--{key}={value}" for key, value in wanted.items() if value is not None]
    lines += ["--requeue", *(f"--{option}" for option in sbatch)]
    for line in lines:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=\S+)?", line):
            raise ValueError(f"{line!r} is no option of sbatch; write it without dashes and blanks, as qos=high")
    exports = {
        "PET_SIGNALS_TO_HANDLE": ",".join(number.name for number in SIGNALS),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace),  # torchrun would kill after 30 s
        **job.environment,
    }
    text = _FILE.format(
        options="\n".join(f"#SBATCH {line}" for line in lines),
        exit_file=shlex.quote(str(Path(run_dir, "exit.json"))),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
        processes=job.processes,
        port=job.port,
        ports=_PORTS,
        srun="srun" if cpus is None else f"srun --cpus-per-task={cpus}",  # srun does not take it over from sbatch
        grace=grace,
        python=shlex.quote(sys.executable),
        max_restarts=job.max_restarts,
        meeting=_MEETING,
        train=shlex.join(job.train),
    )
    file = f"{name}.sbatch"
    return Launch(text=text, command=["sbatch", file], files={file: text})


# `srun --wait`: nodes end within moments of each other, also after a signal; one that stays behind is stuck.
_FILE = """\
#!/bin/bash
{options}

# Before the time limit and on preemption the training saves, and says in exit.json whether to start it again.
exit_file={exit_file}
rm -f "$exit_file"  # an earlier attempt's word does not count

# SIGTERM comes to this script itself on scancel, or when Slurm requeues the job: not to be undone here.
ended=
trap 'ended=1' TERM

{exports}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + {processes} - 1) / {processes}))}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
echo "attempt $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"

place='PET_LOCAL_ADDR=$SLURMD_NODENAME PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)),{meeting} exec "$@"'
{srun} --wait={grace} bash -c "$place" node {python} -m torch.distributed.run \\
    --nnodes="$SLURM_NNODES" --nproc-per-node={processes} --max-restarts={max_restarts} \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$(({port} + SLURM_JOB_ID % {ports}))" \\
    {train}
code=$?

if [ -z "$ended" ] && grep -qs '"requeue": true' "$exit_file"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
