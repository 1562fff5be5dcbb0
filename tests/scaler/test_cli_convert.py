"""`scaler convert` as a user runs it: its options arrive, and Ctrl-C can be pressed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.index import ShardIndex
from tests.images import make_image_folder


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scaler.cli", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_image_folder(folder, num_images=30, size=64)
    return folder


def test_lists_splits_and_sizes(photos: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))[:20]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{file},{i % 2}\n" for i, file in enumerate(files)))
    words = ["--from-list", tmp_path / "list.csv", "--val-fraction", 0.2, "--resize", 24, "--quality", 50]
    done = convert(photos, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 images of 2 classes in 2 shards (")
    assert done.stdout.endswith(f" in {tmp_path / 'out'} (train: 16, val: 4)\n")
    sizes = [ShardIndex.load(tmp_path / "out" / part).num_samples for part in ("train", "val")]
    assert sizes == [16, 4]
    options = json.loads((tmp_path / "out/convert.json").read_text())["options"]
    assert (options["resize"], options["quality"]) == (24, 50)
    again = convert(tmp_path / "out/train", tmp_path / "again", "--shard-size", "10KB", "--seed", 3)
    assert again.returncode == 0 and again.stdout.startswith("16 images of 2 classes in ")
    wrong = convert(photos, tmp_path / "x", "--quality", 50)
    assert (
        wrong.returncode == 1
        and wrong.stderr == "error: quality 50 is that of the JPEGs that resize makes, from 1 to 100\n"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_command_goes_on(photos: Path, tmp_path: Path, workers: int) -> None:
    command = [sys.executable, "-m", "scaler.cli", "convert", photos, tmp_path / "out"]
    command = [*map(str, command), "--shard-size", "1", "--workers", str(workers)]
    code = (
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]\n"
    )
    code += "import shards.writer as w, time; old = w.pack_columns\n"
    code += "w.pack_columns = lambda **k: (time.sleep(0.1), old(**k))[1]\n"  # so that it lasts
    code += "from scaler.cli import main; main()"
    slow = [sys.executable, "-c", code, "scaler", *command[3:]]
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.offsets"))) < 4:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "interrupted; the same command goes on with the shards that are missing"
    assert not list((tmp_path / "out").glob("*.partial")) and not (tmp_path / "out/index.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "30 images of 3 classes in 30 shards" in done.stdout
    assert "shards were there already" in done.stdout
