"""The comparison runs: both sides of both methods, for two steps. What the features are worth takes it half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quality.compare import main


@pytest.mark.filterwarnings("ignore")
def test_both_sides_train_and_are_scored(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    main(["--sets", "digits", "--seeds", "1", "--steps", "2", "--images", "40", "--out", str(out)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["–", "raw pixels"],
        *([name, side] for name in ("simclr", "dinov2") for side in ("initial", "ours", "lightly", "ours − lightly")),
    ]
    assert all(-100 <= float(cell) <= 100 for row in rows for cell in row[2:])
