"""`scaler bench loss`: every contender really runs, gives the same gradients, and takes the memory that is claimed."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from scaler.bench.loss import KERNELS, LIGHTLY, OURS, PLAIN, _simclr, _whole, as_lines, as_table, measure
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
    if method == "simclr" and result["device"] == "cpu":
        assert rows.pop(KERNELS) == {"name": KERNELS, "missing": "need a GPU"}
    assert list(rows) == [OURS, LIGHTLY, PLAIN] and (result["method"], result["size"]) == (method, size)
    for name, row in rows.items():
        assert row["seconds"] > 0 < row["times"] and row["difference"] < 1e-5
        assert (row["difference"] == 0) == (name == OURS and method != "simclr")  # NT-Xent's truth is float64's
        if LINUX and name != OURS:
            share = 0.6 if method == "sinkhorn" else 0.4  # so small that allocators' and MKL's slack counts
            assert rows[OURS]["peak_bytes"] < share * row["peak_bytes"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(result))
    text = console.export_text()
    assert ("from float64" if method == "simclr" else "from ours") in text and ("need a GPU" in text) == (
        method == "simclr" and result["device"] == "cpu"
    )
    titles = {
        "simclr": "3,000 embeddings of 128 at 0.1",
        "dinov2": "16 images and 8,192 prototypes",
        "sinkhorn": "928 masked patches and 8,192 prototypes",
    }
    assert titles[method] in text
    assert [line.split(":")[0] for line in as_lines(result)] == [f"ours, against {name}" for name in (LIGHTLY, PLAIN)]


def test_width_and_temperature_are_those_asked_for() -> None:
    steps, _, exact = _simclr(8, 24, 0.1, device=torch.device("cpu"), lightly=True)
    gradients = [step()[0] for step in (*steps.values(), exact)]
    assert all(gradient.shape == (16, 24) for gradient in gradients) and gradients[-1].dtype == torch.float64
    with pytest.raises(ValueError, match=r"temperature 0\.001 is too low"):
        measure("simclr", size=8, temperature=0.001)


def test_scores_that_do_not_fit_are_left_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (139 << 30, 141 << 30))
    gpu, needed = torch.device("cuda"), 4 * 131_072**2
    assert _whole(needed, gpu) == "its scores take 64 GiB, more than a third of the 139 GiB that are free"
    assert _whole(needed // 4, gpu) is None and _whole(needed, torch.device("cpu")) is None


def test_the_command() -> None:
    done = scaler("bench", "loss", "--size", "8", "--width", "16", "--seconds", "0.001", "--rounds", "1", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["rows"][0]["name"] == OURS and result["width"] == 16
    assert "memory of lightly" in done.stderr
    assert "Example: scaler bench loss" in scaler("bench", "loss", "--help").stdout
    wrong = scaler("bench", "loss", "--method", "moco")
    assert wrong.returncode == 1 and wrong.stderr == "error: no loss of 'moco'; there are simclr, dinov2, sinkhorn\n"
