"""The demo's own parts; the whole of it is `make demo`, which checks its result itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scaler.demo import failure, find_rank, introduction, last_row, last_step, prepare_folder, print_table

PARENT = """
import os, subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, "RANK": str(r)})
            for r in range(3)]
print(*[child.pid for child in children], flush=True)
time.sleep(60)
"""


def test_only_a_demos_folder_is_cleared(tmp_path: Path) -> None:
    mine, fresh = tmp_path / "photos", tmp_path / "new" / "demo"
    (mine / "images").mkdir(parents=True)
    (mine / "images" / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="photos exists and is not from a demo; choose another place with --dir"):
        prepare_folder(mine)
    assert (mine / "images" / "holiday.jpg").read_text() == "precious"
    prepare_folder(fresh)
    (fresh / "left.txt").touch()
    prepare_folder(fresh)
    assert not (fresh / "left.txt").exists() and fresh.is_dir()
    (tmp_path / "empty").mkdir()
    prepare_folder(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not from a demo"):
        prepare_folder(tmp_path / "file")


def test_the_process_of_a_rank_is_found() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        deadline = time.monotonic() + 10  # a child has its environment once it has begun its own program
        while any("RANK" not in psutil.Process(pid).environ() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert find_rank(parent.pid, 2).pid == pids[2]
        with pytest.raises(ValueError, match="no child of rank 3"):
            find_rank(parent.pid, 3)
    finally:
        for child in psutil.Process(parent.pid).children():
            child.kill()
        parent.kill()
        parent.communicate()


def test_the_newest_whole_row_counts(tmp_path: Path) -> None:
    assert last_row(tmp_path) == {} and last_step(tmp_path) == 0
    rows = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text(rows[0])
    assert last_step(tmp_path) == 1
    (tmp_path / "metrics.jsonl").write_text(rows[0] + rows[1] + rows[2][:-4])
    assert last_step(tmp_path) == 2


def test_what_a_training_says_of_itself_is_taken_from_its_last_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("engaged: strategy ddp\nstep 1/9\n")
    size = log.stat().st_size
    with log.open("a") as file:
        file.write("engaged: strategy fsdp2\nresuming from x\n")
    assert introduction(log, start=size) == []
    with log.open("a") as file:
        file.write("step 2/9 loss\n")
    assert introduction(log, start=size) == ["engaged: strategy fsdp2", "resuming from x"]


def test_a_failure_names_the_command_the_log_and_the_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("noise\nerror: no such shards\nTraceback …\nmore noise\n")
    message = failure(["train", "a b"], tmp_path / "log")
    assert message.splitlines() == [
        f"`scaler train 'a b'` failed; its output is in {tmp_path / 'log'}:",
        "error: no such shards",
    ]


def test_the_table_puts_accuracies_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("simclr initialised", "simclr trained", "dinov2 initialised", "dinov2 trained")
    print_table({"pixels": 0.2, "grey pixels": 0.6, **dict(zip(names, (0.1, 0.8, 0.15, 0.7), strict=True))})
    text = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in text.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["random initialisation"]] == ["10.0 %", "15.0 %"]
    assert [cell.strip() for cell in rows["after training"]] == ["80.0 %", "70.0 %"]
    assert [cell.strip() for cell in rows["raw pixels"]] == ["20.0 %", "20.0 %"]
