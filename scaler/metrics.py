"""Metrics of a run, written by rank 0: `metrics.jsonl`, `rejected.jsonl`, the console line, TensorBoard and W&B.

    log = MetricsLog(
        run_dir, rank=0, start_step=0, total_steps=1000, track=recipe.track, recipe=recipe.model_dump(), supply=supply
    )
    log.log({"step": 1, "loss": 5.1, **meter.read()})  # scaler/throughput.py

The files are the truth: one JSON object a line, floats written so that they read back bit for bit, `null` where a
number is not finite (JSON has no NaN). On resume they are cut back to the checkpoint's step.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from scaler.console import ProgressLine
from scaler.environment import environment
from scaler.throughput import Supply, average, diagnose, waited
from scaler.trackers import Tracker, open_trackers
from shards.resize import cut, cut_with_kernel

if TYPE_CHECKING:
    from types import TracebackType

    from scaler.recipe import Track

_WAIT_LIMIT, _WAIT_ROWS = 0.2, 10  # fraction of time, logged rows in a row
_GROWTH_LIMIT, _GROWTH_ROWS = 1.1, 50  # factor over so many rows that all rose
_BUSY_LIMIT, _BUSY_ROWS = 0.6, 10  # utilisation of the GPUs, logged rows in a row
_ALARM_ROWS = 5  # logged rows in a row that show a sign of collapse

Symptoms = Callable[[Mapping[str, float]], Mapping[str, str]]


class MetricsLog:
    """The run's log. On ranks above 0 every method does nothing.

    Args:
        run_dir: holds `metrics.jsonl` and `rejected.jsonl`; created if need be.
        start_step: the step the run continues from; later rows of an earlier attempt are removed. 0: fresh files.
        total_steps: length of the whole run, for the progress bar and the time left.
        track: the recipe's `track` section.
        recipe: the resolved recipe, for trackers that show it.
        supply: what feeds this process, for advice when it waits for data.
        symptoms: the signs of a collapse that a row shows, by name (`Method.symptoms`).
        console: where people read; default: standard output.

    Raises:
        ValueError: a tracker that the recipe asks for is not installed or cannot start.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        start_step: int,
        total_steps: int,
        track: Track,
        recipe: dict[str, Any],
        supply: Supply,
        symptoms: Symptoms = lambda row: {},
        console: Console | None = None,
    ) -> None:
        self._active = rank == 0
        if not self._active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._files: dict[str, IO[bytes]] = {}
        for name in ("metrics", "rejected"):
            path = run_dir / f"{name}.jsonl"
            cut_back(path, step=start_step)
            self._files[name] = path.open("ab")
        self._environment = environment()
        self._trackers: list[Tracker] = open_trackers(
            run_dir, start_step=start_step, track=track, recipe=recipe, environment=self._environment
        )
        self._line = ProgressLine(console or Console(), start_step=start_step, total_steps=total_steps)
        self._health = _Health(supply)
        self._symptoms = symptoms

    def log(self, row: dict[str, Any]) -> None:
        """Append one row, which holds `step`, to `metrics.jsonl` and hand its numbers to the trackers.

        Signs of a collapse are noted in it as `alarm/NAME`; those that stay for some rows are told.
        """
        if not self._active:
            return
        row = {key: _plain(value) for key, value in row.items()}
        signs = self._symptoms(row) if row.get("loss") is not None else {}
        row |= {f"alarm/{name}": 1.0 for name in signs}
        self._write("metrics", [row])
        for tracker in self._trackers:
            tracker.log(row["step"], row)
        for advice in [*self._health.check(row), *self._health.alarms(signs)]:
            self.note(advice)

    def reject(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append the loader's records of replaced samples to `rejected.jsonl`, each with the step that met it."""
        if self._active and records:
            self._write("rejected", [{"step": step, **{k: _plain(v) for k, v in r.items()}} for r in records])

    def progress(self, step: int, row: dict[str, Any]) -> None:
        """Show how far the run is: a live bar on a terminal, elsewhere one plain line.

        May be called at every step; an empty `row` only moves the bar and prints nothing elsewhere.
        """
        if self._active:
            self._line.update(step, {key: _plain(value) for key, value in row.items()})

    def note(self, text: str) -> None:
        """Print a line for people, above the bar where there is one."""
        if self._active:
            self._line.note(text)

    def describe(self, report: dict[str, Any], *, memory: list[dict[str, int]]) -> None:
        """Say what memory is for, and write it to `run.json` with the strategy's report and the environment.

        Args:
            report: what is engaged, by the strategy's own account.
            memory: of each rank, bytes by part.
        """
        if not self._active:
            return
        largest = max(memory, key=lambda parts: sum(parts.values()))
        mib = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in largest.items())
        self.note(f"memory of the fullest rank in MiB: {mib}")
        values = {
            **report,
            "views_cut_by": "kernel" if cut is cut_with_kernel else "torch",  # equal but for rounding
            "memory_bytes": largest,
            "memory_bytes_by_rank": memory,
            "environment": self._environment,
        }
        temporary = self._run_dir / ".run.json.tmp"
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(self._run_dir / "run.json")

    def sync(self) -> None:
        """Put the rows on the disk for good; called before a checkpoint, so that a power cut loses none before it."""
        if self._active:
            for file in self._files.values():
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the bar, the trackers and the files; calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        self._line.close()
        for tracker in self._trackers:
            tracker.close()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        # One write and one flush for whole lines, so that a kill leaves at most one torn line, the last.
        # ASCII with escapes, since file names on Linux need not be valid Unicode.
        self._files[name].write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii"))
        self._files[name].flush()


def cut_back(path: Path, *, step: int) -> None:
    """Remove the rows of `path` after `step`, and a torn or damaged line; the rows that stay keep their bytes.

    The file is replaced in one go (temporary file, fsync, rename), or left alone when there is nothing to remove.
    Step 0 leaves no row.
    """
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    removed = False
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            if _row_step(line) <= step and step > 0:
                target.write(line)
            else:
                removed = True
        target.flush()
        os.fsync(target.fileno())
    if removed:
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    else:
        temporary.unlink()


def _row_step(line: bytes) -> float:
    """The step of a whole row; infinity for a line that is not one (torn by a power cut)."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _plain(value: Any) -> Any:
    """Tensor and numpy scalars as Python numbers; numbers that are not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Health:
    """Says once, in words, when the run starves, memory keeps growing, or a sign of collapse stays."""

    def __init__(self, supply: Supply) -> None:
        self._supply = supply
        self._starved: list[dict[str, Any]] = []  # the latest rows, as far as each waited
        self._memory: list[float] = []
        self._idle = 0  # the latest rows, as far as the GPUs were idle in each without waiting for data
        self._said: set[str] = set()
        self._signs: Counter[str] = Counter()  # rows in a row that show each

    def alarms(self, signs: Mapping[str, str]) -> list[str]:
        """The sentences of the signs that this row is the last of several to show; one that went and came back too."""
        self._signs = Counter({name: self._signs[name] + 1 for name in signs})
        return [
            f"alarm: {sentence} (seen in {_ALARM_ROWS} logged rows)"
            for name, sentence in signs.items()
            if self._signs[name] == _ALARM_ROWS
        ]

    def check(self, row: dict[str, Any]) -> list[str]:
        """Advice that this row gives rise to, if any."""
        advice = []
        if "data_wait" in row:
            starved = waited(row, self._supply) > _WAIT_LIMIT
            self._starved = [*self._starved[1 - _WAIT_ROWS :], row] if starved else []
            if len(self._starved) == _WAIT_ROWS and "wait" not in self._said:
                self._said.add("wait")
                mean = average(self._starved)
                advice.append(
                    f"warning: training waited for data {waited(mean, self._supply):.0%} of the time, and above "
                    f"{_WAIT_LIMIT:.0%} for {_WAIT_ROWS} logged rows: {diagnose(mean, self._supply)}"
                )
        busy = row.get("gpu_utilization")
        if busy is not None:
            self._idle = self._idle + 1 if busy < _BUSY_LIMIT and not self._starved else 0
            if self._idle == _BUSY_ROWS and "idle" not in self._said:
                self._said.add("idle")
                advice.append(
                    f"warning: the GPUs were busy {busy:.0%} of the time, and below {_BUSY_LIMIT:.0%} for {_BUSY_ROWS} "
                    "logged rows, without waiting for data: steps are too small for them; raise "
                    "strategy.micro_batch_size (scaler plan says what fits), or set strategy.compile=true"
                )
        memory = row.get("memory_gib")
        if memory is not None:
            self._memory = [*self._memory, memory] if not self._memory or memory > self._memory[-1] else [memory]
            grown = len(self._memory) > _GROWTH_ROWS and memory > _GROWTH_LIMIT * self._memory[0]
            if grown and "memory" not in self._said:
                self._said.add("memory")
                advice.append(
                    f"warning: memory grew at each of the last {len(self._memory) - 1} logged rows, from "
                    f"{self._memory[0]:.2f} to {memory:.2f} GiB: something is kept from step to step; stop before the "
                    "machine does (the run resumes from its checkpoint) and lower data.num_workers if it is the host's"
                )
        return advice
