"""`scaler bench loss`: every contender really runs, gives the same gradients, and takes the memory that is claimed."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from scaler.bench.loss import LIGHTLY, OURS, PLAIN, as_lines, as_table, measure
from scaler.methods.dinov2 import tiles
from tests.scaler.test_cli import scaler

LINUX = sys.platform == "linux"


@pytest.mark.parametrize(("method", "size"), [("simclr", 1500), ("dinov2", 16), ("sinkhorn", 16)])
def test_all_have_the_same_gradients_and_ours_the_least_memory(
    method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiles, "_ELEMENTS_ELSEWHERE", 1 << 20
    )  # as small for these prototypes as the default for 65,536
    result = measure(method, size=size, prototypes=8192, seconds=0.001, rounds=1)
    rows = {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert list(rows) == [OURS, LIGHTLY, PLAIN] and (result["method"], result["size"]) == (method, size)
    for name, row in rows.items():
        assert row["seconds"] > 0 < row["times"] and row["difference"] < 1e-5
        if LINUX and name != OURS:
            share = 0.6 if method == "sinkhorn" else 0.4  # so small that allocators' and MKL's slack counts
            assert rows[OURS]["peak_bytes"] < share * row["peak_bytes"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(result))
    text = console.export_text()
    titles = {
        "simclr": "3,000 embeddings of 128",
        "dinov2": "16 images and 8,192 prototypes",
        "sinkhorn": "928 masked patches and 8,192 prototypes",
    }
    assert titles[method] in text
    assert [line.split(":")[0] for line in as_lines(result)] == [f"ours, against {name}" for name in (LIGHTLY, PLAIN)]


def test_the_command() -> None:
    done = scaler("bench", "loss", "--size", "8", "--seconds", "0.001", "--rounds", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["rows"][0]["name"] == OURS
    assert "memory of lightly" in done.stderr
    assert "Example: scaler bench loss" in scaler("bench", "loss", "--help").stdout
    wrong = scaler("bench", "loss", "--method", "moco")
    assert wrong.returncode == 1 and wrong.stderr == "error: no loss of 'moco'; there are simclr, dinov2, sinkhorn\n"
