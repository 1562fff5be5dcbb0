"""Runs are read in whatever state they are, and curves are thinned without losing what they show."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.show.runs import read_run, read_runs, thinned

VALUES = st.one_of(st.floats(-1e6, 1e6), st.just(math.inf))


@given(values=st.lists(VALUES, max_size=300), most=st.integers(2, 50))
def test_thinned_curves_keep_extremes_and_gaps(values: list[float], most: int) -> None:
    """No stretch of 1/(most/2) of the curve loses its smallest, its largest or what was not finite there."""
    exact = np.array(values, dtype=np.float64)
    kept = thinned(exact, most=most)
    assert (np.diff(kept) > 0).all() and len(kept) <= max(len(values) if len(values) <= most else 0, 3 * most // 2 + 2)
    if len(values) <= most:
        assert kept.tolist() == list(range(len(values)))
        return
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    for low, high in itertools.pairwise(edges):
        whole, part = exact[low:high], exact[kept[(kept >= low) & (kept < high)]]
        assert np.isinf(whole).any() == np.isinf(part).any()
        finite = whole[np.isfinite(whole)]
        if len(finite):
            shown = part[np.isfinite(part)]
            assert (shown.min(), shown.max()) == (finite.min(), finite.max())


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def rows(*values: dict[str, object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_columns_that_come_and_go(tmp_path: Path) -> None:
    """Columns of some rows only, numbers that were not finite, rows out of order and damaged ones."""
    whole = rows({"step": 2, "loss": 3.0, "val/top1": 0.5}, {"step": 4, "loss": None}, {"step": 3, "loss": 2.0})
    others = rows({"loss": 1.0}, {"step": 6, "lr": 0.1, "name": "a"})
    write(tmp_path, "metrics.jsonl", f'{whole}no json\n{others}{{"step": 7, "lo')
    run = read_run(tmp_path)
    steps, losses = run.series("loss")
    assert steps.tolist() == [2, 3, 4] and losses.tolist() == [3.0, 2.0, math.inf]
    assert [part.tolist() for part in run.series("lr")] == [[6], [0.1]]
    assert run.last("loss") == 2.0 and run.typical("loss") == 2.5 and run.last("nothing") is None
    assert run.problems == [
        "metrics.jsonl: damaged lines are left out: 2, the first is line 4",
        "metrics.jsonl: rows without a step are left out: 1",
    ]


@pytest.mark.parametrize(
    ("files", "state", "failed"),
    [
        ({}, "no run: it holds neither recipe.yaml nor metrics.jsonl", True),
        ({"exit.json": '{"reason": "done"}'}, "done", False),
        ({"exit.json": '{"reason": "signal"}'}, "stopped by a signal; start it again to go on", False),
        ({"exit.json": '{"reason": "error", "error": "disk full"}'}, "failed: disk full", True),
        ({"heartbeat/rank-00000.json": "{}"}, "running; it has not logged a step yet", False),
        ({"exit.json": "{"}, "unfinished: it was killed, or its machine is gone (no exit.json)", False),
        ({"exit.json": "[1]", "best.json": "\x00"}, "unfinished: it was killed", False),
    ],
)
def test_every_state_is_told(files: dict[str, str], state: str, failed: bool, tmp_path: Path) -> None:
    if files:
        write(tmp_path, "recipe.yaml", "method: {name: simclr}\n")
    for name, text in files.items():
        write(tmp_path, name, text)
    run = read_run(tmp_path)
    assert run.state.startswith(state) and run.failed == failed
    damaged = [name for name, text in files.items() if text in ("{", "[1]", "\x00")]
    assert [problem.split()[0] for problem in run.problems] == sorted(damaged)


def test_a_run_that_has_been_silent_is_not_running(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", rows({"step": 1, "loss": 1.0}))
    assert read_run(tmp_path).state == "running"
    os.utime(tmp_path / "metrics.jsonl", (time.time() - 1000,) * 2)
    assert read_run(tmp_path).state == "unfinished: it was killed, or its machine is gone (no exit.json)"


def test_runs_get_names_that_differ(tmp_path: Path) -> None:
    for name in ("a/first", "b/first", "second"):
        (tmp_path / name).mkdir(parents=True)
    names = [run.name for run in read_runs([tmp_path / "a/first", tmp_path / "b/first"])]
    assert names == ["a/first", "b/first"]
    assert [run.name for run in read_runs([tmp_path / "a/first", tmp_path / "second"])] == ["first", "second"]
    with pytest.raises(ValueError, match="is no folder"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(ValueError, match="more than once"):
        read_runs([tmp_path / "second", tmp_path / "a" / ".." / "second"])
