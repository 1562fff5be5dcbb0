"""`scaler bench convert`: every row really converts."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from scaler.bench.convert import OURS, STOCK, as_lines, as_table, measure
from tests.images import make_image_folder
from tests.scaler.test_cli import scaler


def test_made_sets_are_converted_by_all() -> None:
    result = json.loads(json.dumps(measure(None, small=60, large=3, processes=2, rounds=2, peers=["webdataset"])))
    assert {name: found["files"] for name, found in result["sets"].items()} == {"small": 60, "large": 3}
    for found in result["sets"].values():
        rows = {(row["name"], row["processes"]): row for row in found["rows"]}
        assert {(OURS, 1), (OURS, 2), (STOCK, 1), ("Python tarfile", 1)} <= set(rows)
        for row in rows.values():
            assert "missing" in row or row["files_per_second"] > 0 < row["output_over_input"]
        assert rows[OURS, 1]["output_over_input"] < rows[STOCK, 1]["output_over_input"] < 3
        pair = f"one process, against {STOCK}"
        assert set(found["ratios"]) == {pair, f"{pair}, processor time", "2 processes against one"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(result))
    assert re.search(r"small: 60 files of 6\.[678] KB", console.export_text())
    assert any("large: one process, against" in line for line in as_lines(result))


def test_a_users_folder_is_only_read(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "photos", num_images=12, classes=0, size=32)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "photos").rglob("*"))
    words = [str(tmp_path / "photos"), "--rounds", "1", "--processes", "1", "--peers", "none", "--json"]
    command = [sys.executable, "-m", "scaler.cli", "bench", "convert", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sets"]["yours"]
    assert (found["files"], found["ratios"]) == (12, {})
    assert [row["name"] for row in found["rows"]] == [OURS, "Python tarfile", "GNU tar"]
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "photos").rglob("*")) == before
    wrong = scaler("bench", "convert", str(tmp_path / "photo"))
    assert wrong.returncode == 1 and wrong.stderr.startswith(f"error: {tmp_path}/photo is not a folder")
