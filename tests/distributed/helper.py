"""Runs a function on real gloo processes: the one way in which tests use torch.distributed.

def job(world: World, factor: int) -> Tensor:            # at module level, so that the children can import it
    return world.sum(torch.tensor(world.rank * factor))

results = run_distributed(job, 2, 10)                    # what each rank returned, in rank order
"""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scaler.collectives import World

# Imported once per test session, not once per process. DeepSpeed may ask CUDA for its devices, which no fork survives.
_PRELOADED = ["tests.tiny", "tests.runs", *([] if torch.cuda.is_available() else ["scaler.strategies.zero"])]
_GRACE = 5.0  # seconds that the other ranks get to fail by themselves once one has


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `fn(world, *args)` in `world_size` fresh gloo processes of one thread each; return their results.

    `fn`, `args` and results are pickled: `fn` lives at module level, tensors come back detached and on the CPU.

    Raises:
        RuntimeError: a rank raised or died; the message holds its traceback, the first failure first.
        TimeoutError: the processes did not end within `timeout` seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="distributed-") as name:
        folder = Path(name)
        jobs = pickle.dumps((fn, args))
        processes = [
            context.Process(target=_child, args=(jobs, rank, world_size, str(folder), timeout))
            for rank in range(world_size)
        ]
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for process in processes:
                process.start()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        try:
            finished = _wait(processes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError("\n".join(path.read_text() for path in errors))
        if not finished:
            raise TimeoutError(f"{world_size} processes of {fn.__qualname__} did not end within {timeout} seconds")
        dead = [f"rank {rank}: exit code {p.exitcode}" for rank, p in enumerate(processes) if p.exitcode]
        if dead:
            raise RuntimeError(f"{fn.__qualname__} died without a traceback: {', '.join(dead)}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], timeout: float) -> bool:
    """Wait until all have ended; shortly after the first failure stop waiting. False if some still run."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.02)
    return not any(process.is_alive() for process in processes)


def _child(jobs: bytes, rank: int, world_size: int, folder: str, timeout: float) -> None:
    try:
        torch.set_num_threads(1)
        fn, args = pickle.loads(jobs)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = fn(World.current(), *args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(_portable(result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)  # without waiting for peers that may hang in a collective


def _portable(value: Any) -> Any:
    """`value` with the tensors inside it detached and on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_portable(item) for item in value)
    return value
