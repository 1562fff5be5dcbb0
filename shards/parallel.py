"""One function over many tasks in worker processes, with a progress bar; the order of results is the tasks'."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Task as Bar
from rich.text import Text

Task = TypeVar("Task")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # of a worker process: sent once, not with every task


def default_workers() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_processes(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    num_tasks: int,
    workers: int,
    label: str | None,
    total: int,
    amount: Callable[[Result], int],
    in_bytes: bool = False,
) -> list[Result]:
    """`[function(task) for task in tasks]` on `workers` processes (1: in this one), under a progress bar.

    The function reaches the workers once (where processes fork, without being pickled), so it may hold much; tasks
    should be small. There are `num_tasks` of them, taken from the iterable when their turn comes. The bar (on standard
    error) is called `label`, None for no bar; each result moves it by `amount(result)` towards `total`, which are
    shown as sizes when `in_bytes`. The first exception ends it all: tasks that have not begun are dropped, those under
    way finish, then it is raised. Raises `ValueError` when `workers` is below 1 and when a worker was killed (for
    example for memory).
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed")
    if workers == 1 or num_tasks < 2:
        with _progress_bar(label, total=total, in_bytes=in_bytes) as advance:
            results = []
            for task in tasks:
                results.append(function(task))
                advance(amount(results[-1]))
            return results
    # Forked workers need no importable main module (notebooks, `python -`) and start at once.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    workers = min(workers, num_tasks)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), function))
    try:
        # Few tasks are handed out ahead, so that an error or Ctrl-C does not leave a long queue behind. The first ones
        # go before the bar appears, since they fork the workers and the bar has a thread of its own.
        waiting = enumerate(tasks)
        running = {pool.submit(_call, task): number for number, task in islice(waiting, 2 * workers)}
        done: dict[int, Result] = {}
        with _progress_bar(label, total=total, in_bytes=in_bytes) as advance:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    done[number] = future.result()
                    advance(amount(done[number]))
                    running |= {pool.submit(_call, task): number for number, task in islice(waiting, 1)}
        return [done[number] for number in range(num_tasks)]
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (out of memory?); run again to continue, with fewer workers if it repeats"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _call(task: Any) -> Any:
    return _function(task)


def _start_worker(parent: int, function: Callable[[Any], Any]) -> None:
    """Leave Ctrl-C to the parent, and end when it is gone: a worker waiting for tasks would otherwise wait for ever."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextmanager
def _progress_bar(label: str | None, *, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    if label is None:
        yield lambda amount: None
        return
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(), _Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
