"""`scaler bench checkpoint`: its arithmetic, and that it measures real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scaler.bench.checkpoint import Window, as_rows, summarize
from tests.long import only_long
from tests.scaler.test_cli import scaler


def window(saved: bool, wall: float, *, cpu: float, stall: float = 0.0) -> Window:
    return Window(saved, wall, cpu, steps=[wall / 4] * 4, stall=stall, written=2.0 if saved else 0.0)


def test_costs_are_fractions_of_the_time_without() -> None:
    found = summarize(
        [
            window(True, 10.4, cpu=20.2, stall=0.1),
            window(False, 10.0, cpu=20.0),
            window(False, 10.0, cpu=20.0),
            window(True, 10.8, cpu=20.2, stall=0.3),
        ]
    )
    assert found["cost"] == pytest.approx(0.06) and found["cost_by_pair"] == pytest.approx([0.04, 0.08])
    assert found["cpu_cost"] == pytest.approx(0.01) and found["stall_cost"] == pytest.approx(0.02)
    assert found["step_seconds"] == pytest.approx({"with": 2.65, "without": 2.5})
    assert (found["windows"], found["steps_in_window"], found["written_after_seconds"]) == (4, 4, 2.0)


@only_long
def test_two_processes_measure_together(tmp_path: Path) -> None:
    words = ["simclr/demo", "--processes", "2", "--minutes", "0.01", "--pairs", "2", "--to", str(tmp_path / "here")]
    command = [sys.executable, "-m", "scaler.cli", "bench", "checkpoint", *words, "strategy.name=fsdp2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["strategy"], found["place"]) == (2, "fsdp2", str(tmp_path / "here"))
    assert [w["saved"] for w in found["raw"]] == [True, False, False, True]
    assert all(w["wall"] > 0 and len(w["steps"]) == found["steps_in_window"] for w in found["raw"])
    assert all((w["stall"] > 0) == (w["written"] > 0) == w["saved"] for w in found["raw"])
    sizes = sum(path.stat().st_size for path in (tmp_path / "here").rglob("*.safetensors"))
    assert 0.45 * sizes < found["bytes_of_rank_0"] < 0.55 * sizes, "a checkpoint was written, by both ranks"
    assert as_rows(found)["its place"] == str(tmp_path / "here")


def test_help_and_errors() -> None:
    text = scaler("bench", "checkpoint", "--help").stdout
    assert "Example: scaler bench checkpoint" in text.replace("\n ", "")
    wrong = scaler("bench", "checkpoint", "simclr/nothing")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: no recipe 'simclr/nothing'")
