"""The meter of a run, and the doctor that says what a run that waits for data is limited by."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaler.recipe import load_recipe
from scaler.throughput import Supply, Throughput, average, diagnose, waited
from scaler.train import run
from shards.convert import convert
from tests.http import faulty_server
from tests.images import make_image_folder
from tests.runs import write_recipe

STAGES = ("step", "read", "decode", "resize", "transfer", "device_decode", "augment")
CPU = torch.device("cpu")


def supply(**changes: Any) -> Supply:
    return Supply(**{"num_workers": 3, "processes": 2, "cores": 16, "remote": False, "gpu": False, **changes})


def row(*, wait: float = 0.43, step: float = 1.0, images: float = 410.0, **seconds: float) -> dict[str, Any]:
    figures = {"images_per_second": images / step, "data_wait": wait, "seconds/step": step}
    return figures | {f"seconds/{name}": value for name, value in seconds.items()}


def test_throughput_counts_images_and_waiting_per_interval() -> None:
    start = time.perf_counter()
    meter = Throughput()
    with meter.waiting():
        time.sleep(0.06)
    time.sleep(0.04)
    meter.add(30)
    meter.add(20)
    figures = meter.read()
    elapsed = time.perf_counter() - start
    assert 50 / elapsed <= figures["images_per_second"] <= 50 / 0.1
    assert 0.06 / elapsed <= figures["data_wait"] < 1.0
    assert 0.05 <= figures["seconds/step"] <= elapsed / 2
    time.sleep(0.01)
    assert meter.read() == {"images_per_second": 0.0, "data_wait": 0.0}


def test_stages_are_seconds_per_step_of_this_interval() -> None:
    meter = Throughput()
    for _ in range(2):
        meter.add_stages({"seconds": {"read": 0.25, "decode": 1.0}})
        meter.add_stages({"seconds": {"read": 0.25, "decode": 2.0}})
        meter.at("augment", CPU)
        time.sleep(0.02)
        meter.at("observe", CPU)
        time.sleep(0.05)
        meter.add(8)
    figures = meter.read()
    assert (figures["seconds/read"], figures["seconds/decode"]) == (0.5, 3.0)
    assert 0.02 <= figures["seconds/augment"] <= figures["seconds/step"] - 0.05
    meter.add(8)
    assert set(meter.read()) == {"images_per_second", "data_wait", "seconds/step"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stages_on_a_gpu_are_its_own_time() -> None:
    meter, device, x = Throughput(), torch.device("cuda"), torch.ones(2048, 2048, device="cuda")
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
    meter.at("augment", device)
    events[0].record()
    for _ in range(50):
        x = (x @ x).clamp_(0, 1)
    events[1].record()
    meter.at("learn", device)
    meter.add_stages({"seconds": {"read": 0.1}, "transfer": events, "device_decode": events})
    assert float(x[0, 0]) == 1
    meter.add(1)
    figures = meter.read()
    assert figures["seconds/device_decode"] == figures["seconds/transfer"]
    assert 0 < figures["seconds/transfer"] <= figures["seconds/augment"] <= figures["seconds/step"]


@pytest.mark.parametrize(
    ("figures", "around", "said"),
    [
        (
            row(decode=2.13, resize=0.66, read=0.12),
            supply(),
            "a worker spends 73% decoding, 23% cropping and resizing, 4% reading: 3 a process deliver 423 images/s, "
            "the step wants 719: raise data.num_workers from 3 to 6 (16 cores here, 2 processes), or store smaller "
            "images (scaler convert --resize 256)",
        ),
        (
            row(decode=2.1, resize=0.9),
            supply(num_workers=1, cores=8),
            "from 1 to 3 (8 cores here, 2 processes; 6 would",
        ),
        (row(decode=5.1, resize=1.8), supply(num_workers=7, cores=4), "use a machine with more cores for each process"),
        (row(resize=2.1, decode=0.5), supply(), "a worker spends 81% cropping and resizing, 19% decoding, 0% reading"),
        (row(read=2.1, decode=0.5), supply(), "or put the shards on a faster disk"),
        (row(read=2.1, decode=0.5), supply(remote=True), "local disk (data.cache_size, data.cache_dir)"),
        (
            row(read=9.0, decode=0.1),
            supply(remote=True, cores=2),
            "data.cache_dir), or raise data.num_workers from 3 to",
        ),
        (row(decode=0.3, wait=0.5), supply(num_workers=0), "the training process itself does the loading, 100% decod"),
        (row(decode=0.3, wait=0.5), supply(), "the workers could deliver 4100 images/s, the step wants 820"),
        (row(decode=2.9, transfer=0.9, step=1.0, wait=0.1), supply(gpu=True), "the copy to the GPU, 900 ms of a step"),
        (row(decode=0.5, augment=0.4, wait=0.02), supply(gpu=True), "larger micro-batches (strategy.micro_batch_size)"),
        (
            row(decode=2.13, resize=0.66, read=0.12),
            supply(gpu=True),
            "raise data.num_workers from 3 to 6 (16 cores here, 2 processes), or decode on the GPU (data.decode=gpu), "
            "or store smaller",
        ),
        (
            row(decode=2.13, resize=0.66, read=0.12),
            supply(gpu=True, cores=8),  # too few for six workers a process
            "719: decode on the GPU (data.decode=gpu), or use a machine with more cores for each process",
        ),
        (row(resize=2.1, decode=0.5), supply(gpu=True), "or decode on the GPU (data.decode=gpu), or "),
        (row(decode=2.9), supply(gpu=True, decode="gpu"), "(16 cores here, 2 processes), or store upright base"),
        (
            row(read=0.2, device_decode=0.95, wait=0.3),
            supply(gpu=True, decode="gpu"),
            "the limit is decoding on the GPU, 950 ms of a step of 1000 ms: store smaller images (scaler convert "
            "--resize 256), or decode in workers where there are cores for them (data.decode=cpu)",
        ),
        ({"images_per_second": 1.0, "data_wait": 0.5}, supply(), "raise data.num_workers (now 3; 16 cores here, 2 pro"),
    ],
)
def test_the_limit_is_named_with_numbers_and_a_remedy(figures: dict[str, Any], around: Supply, said: str) -> None:
    assert said in diagnose(figures, around)


def test_advice_is_silent_about_the_gpu_where_it_has_no_part() -> None:
    for figures, around in (
        (row(decode=2.9), supply()),
        (row(decode=2.9), supply(gpu=True, decode="gpu")),
        (row(read=2.9), supply(gpu=True)),
    ):
        assert "data.decode" not in diagnose(figures, around)


def test_decoding_on_the_gpu_is_waited_for_where_it_fills_the_step() -> None:
    around = supply(gpu=True, decode="gpu")
    assert waited(row(wait=0.01, device_decode=0.7), around) == 0.01
    assert waited(row(wait=0.01, device_decode=0.9), around) == 0.9


def test_an_average_is_the_row_of_the_whole_time() -> None:
    rows = [row(wait=0.5, step=1.0, images=64, decode=0.5), row(wait=0.1, step=3.0, images=64, decode=1.5)]
    assert average(rows) == pytest.approx(row(wait=0.2, step=2.0, images=64, decode=1.0))


@given(
    st.fixed_dictionaries(
        {"data_wait": st.floats(0, 1), "images_per_second": st.floats(0, 1e6)},
        optional={f"seconds/{name}": st.none() | st.floats(0, 1e4) for name in STAGES},
    ),
    st.builds(
        Supply,
        num_workers=st.integers(0, 64),
        processes=st.integers(1, 64),
        cores=st.integers(1, 256),
        remote=st.booleans(),
        gpu=st.booleans(),
        decode=st.sampled_from(["cpu", "gpu"]),
    ),
)
def test_any_row_gives_one_line_of_advice(figures: dict[str, Any], around: Supply) -> None:
    assert waited(figures, around) >= figures["data_wait"]
    assert re.fullmatch(r"[^\n]{20,600}", diagnose(figures, around))


def make_shards(folder: Path, *, size: int, num_images: int) -> None:
    """Of PNG files, which are always decoded whole."""
    make_image_folder(folder / "images", num_images=num_images, classes=0, size=size, format="png")
    convert(folder / "images", folder / "shards", workers=1)


def train_on(folder: Path, **data: Any) -> list[dict[str, Any]]:
    """Fourteen steps of a real run with one worker on the folder's shards; its rows."""
    data = {"global_batch_size": 8, "num_workers": 1, "shards": str(folder / "shards"), **data}
    schedule = {"total": "14 steps", "warmup": "0 steps"}
    recipe = write_recipe(folder / "run.yaml", "simclr", shards=folder, schedule=schedule, data=data)
    run(load_recipe(str(recipe)))
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_its_decoder_holds_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, size=400, num_images=16)
    rows = train_on(tmp_path, num_workers=0)  # no other process's luck with the cores decides
    assert all(row["seconds/decode"] > row["seconds/resize"] > 0 and row["seconds/read"] > 0 for row in rows)
    assert all(0 < row["seconds/augment"] < row["seconds/step"] for row in rows)
    (line,) = re.findall("warning: training waited for data .*", capsys.readouterr().out)
    assert re.search(r"10 logged rows: the training process itself does the loading, \d+% decoding, .* images/s", line)
    assert "raise data.num_workers from 0 to" in line and "scaler convert --resize" in line


def test_a_run_that_a_server_holds_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, size=32, num_images=64)
    with faulty_server(tmp_path / "shards") as server:
        server.delay = 0.02
        rows = train_on(tmp_path, shards=server.url, cache_dir=str(tmp_path / "cache"), cache_size="1KB")
    assert all(row["seconds/read"] > 8 * 0.02 for row in rows)
    (line,) = re.findall("warning: training waited for data .*", capsys.readouterr().out)
    assert re.search(
        r": a worker spends \d+% reading, .*: give whole shards room on a local disk \(data.cache_size", line
    )


def test_a_run_that_its_model_holds_up_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, size=32, num_images=64)
    rows = train_on(tmp_path, global_batch_size=64)
    assert all(row["seconds/step"] > 0 for row in rows)
    assert "warning: training waited" not in capsys.readouterr().out
