"""What runs have left in their directories, read in whatever state they are: whole, going on, empty or damaged.

    record = read_run(Path("runs/first"))
    record.state, record.problems
    steps, values = record.series("loss")

Nothing here fails on what a run wrote: what cannot be read is named in `problems`.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ALIVE = 120.0  # seconds since a run's last sign of life in which it counts as going on
_ENDED = {
    "done": "done",
    "stop_after": "paused by run.stop_after",
    "patience": "ended: no better evaluation (evaluate.patience)",
    "signal": "stopped by a signal; start it again to go on",
}
_MOST_REJECTED = 100_000  # rows that are read of rejected.jsonl


@dataclass
class RunRecord:
    """One run directory.

    Attributes:
        state: how it stands, in words; failed: whether it ended with an error.
        columns: of metrics.jsonl by name, float64 [rows]: NaN where a row lacks it, infinity where it was not finite.
        recipe, report, best: recipe.yaml, run.json, best.json; empty where there is none.
        rejected: rows of rejected.jsonl.
        evaluations: what `scaler eval` wrote of it.
        problems: what could not be read, a line each.
    """

    path: Path
    name: str
    state: str = ""
    failed: bool = False
    columns: dict[str, Floats] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values of the rows that have a column, infinity where it was not finite."""
        values = self.columns.get(name, np.empty(0))
        there = ~np.isnan(values)
        return self.columns["step"][there] if len(values) else values, values[there]

    def last(self, name: str) -> float | None:
        """The newest finite value of a column."""
        values = self.series(name)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def typical(self, name: str) -> float | None:
        """The median of a column."""
        values = self.series(name)[1]
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None


def read_runs(paths: list[Path]) -> list[RunRecord]:
    """The runs in these directories, under names that differ: as much of the end of each path as that takes.

    Raises:
        ValueError: no such directory, or one given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give run directories, as runs/first")
        if resolved.count(whole) > 1:
            raise ValueError(f"{path} is given more than once; leave one out")
    parts = 1
    while len({whole.parts[-parts:] for whole in resolved}) < len(resolved):
        parts += 1
    return [read_run(path, name="/".join(path.resolve().parts[-parts:])) for path in paths]


def read_run(path: Path, *, name: str | None = None) -> RunRecord:
    """The run in a directory."""
    record = RunRecord(path, name or path.resolve().name)
    record.columns = _columns(record)
    record.recipe = _mapping(record, "recipe.yaml", yaml.safe_load)
    record.report = _mapping(record, "run.json", json.loads)
    record.best = _mapping(record, "best.json", json.loads)
    record.rejected = [row for row, _ in zip(_lines(record, "rejected.jsonl"), range(_MOST_REJECTED), strict=False)]
    for file in sorted((path / "evaluations").glob("*.json")):
        if evaluation := _mapping(record, f"evaluations/{file.name}", json.loads):
            record.evaluations.append(evaluation)
    record.state, record.failed = _state(record)
    return record


def _state(record: RunRecord) -> tuple[str, bool]:
    """How a run stands, and whether it has failed."""
    if not record.recipe and not record.columns:
        return "no run: it holds neither recipe.yaml nor metrics.jsonl", True
    ended = _mapping(record, "exit.json", json.loads)
    if ended.get("reason") == "error":
        return f"failed: {ended.get('error', 'no reason was written')}", True
    if ended:
        return _ENDED.get(str(ended.get("reason")), f"ended: {ended.get('reason')}"), False
    files = [record.path / "metrics.jsonl", *(record.path / "heartbeat").glob("*.json")]
    ages = [time.time() - file.stat().st_mtime for file in files if file.exists()]
    nothing = "" if record.columns else "; it has not logged a step yet"
    if ages and min(ages) < _ALIVE:
        return f"running{nothing}", False
    return f"unfinished: it was killed, or its machine is gone (no exit.json){nothing}", False


def _mapping(record: RunRecord, name: str, parse: Any) -> dict[str, Any]:
    """A file of a run that holds one mapping; {} where there is none or it is damaged."""
    try:
        found = parse((record.path / name).read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        record.problems.append(f"{name} cannot be read: {' '.join(str(error).split()) or repr(error)}")
        return {}
    if not isinstance(found, dict):
        record.problems.append(f"{name} holds no mapping")
        return {}
    return found


def _lines(record: RunRecord, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines; damaged ones are counted."""
    damaged: list[int] = []
    try:
        with (record.path / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    damaged.append(number)
    except FileNotFoundError:
        return
    except OSError as error:
        record.problems.append(f"{name} cannot be read: {error.strerror}")
    if damaged:
        record.problems.append(f"{name}: damaged lines are left out: {len(damaged)}, the first is line {damaged[0]}")


def _columns(record: RunRecord) -> dict[str, Floats]:
    """The columns of metrics.jsonl in the order of their steps."""
    columns: dict[str, array[float]] = {"step": array("d")}
    steps, strange = columns["step"], 0
    for row in _lines(record, "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            strange += 1
            continue
        for name, value in row.items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            column = columns.setdefault(name, array("d"))
            column.extend([float("nan")] * (len(steps) - len(column)))
            column.append(float("inf") if value is None else float(value))
        steps.append(float(step))
    if strange:
        record.problems.append(f"metrics.jsonl: rows without a step are left out: {strange}")
    if not steps:
        return {}
    order = np.argsort(np.array(steps), kind="stable")
    for column in columns.values():
        column.extend([float("nan")] * (len(steps) - len(column)))
    return {name: np.array(column)[order] for name, column in columns.items()}


def thinned(values: Floats, *, most: int) -> NDArray[np.int64]:
    """Positions, ascending, of about `most` of the values [n] (all, if there are no more) that look like all of them:
    of each of equal stretches the smallest, the largest and the first that is not finite; the first and the last."""
    n = len(values)
    if n <= most:
        return np.arange(n)
    edges = np.linspace(0, n, max(1, most // 2) + 1).astype(np.int64)
    kept = {0, n - 1}
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[low:high]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite):
            kept |= {low + int(finite[part[finite].argmin()]), low + int(finite[part[finite].argmax()])}
        if len(finite) < len(part):
            kept.add(low + int(np.flatnonzero(~np.isfinite(part))[0]))
    return np.array(sorted(kept), dtype=np.int64)
