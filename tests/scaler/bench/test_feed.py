"""`scaler bench feed`: every row really runs, cores are kept to, and what the rows mean is what their rates say."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from scaler.bench import feed
from scaler.bench.contenders import STOCK
from scaler.bench.fed import Row, advise, as_lines, as_table
from scaler.bench.feed import measure
from scaler.bench.peers import Files
from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.methods.base import Batch
from scaler.recipe import load_recipe
from scaler.supply import workers_needed
from scaler.train import build_method
from shards.convert import convert
from tests.images import make_image_folder
from tests.scaler.test_cli import scaler

M = 8
CPU = torch.device("cpu")


def said(result: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(as_table(result))
    return "\n".join([console.export_text(), *as_lines(result)])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_image_folder(tmp_path / "images", num_images=30, size=64)
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    return tmp_path / "shards"


def test_every_row_is_measured_on_given_shards(shards: Path) -> None:
    before = os.sched_getaffinity(0)
    result = measure(
        "dinov2/demo", overrides=[f"data.shards={shards}"], images=M, made=20, cores=1, workers=[1], seconds=0.001,
        rounds=2,
    )  # fmt: skip
    assert os.sched_getaffinity(0) == before
    rows = {
        (row["part"], row["name"], row["decode"], row["workers"]): row for row in json.loads(json.dumps(result))["rows"]
    }
    gpu = rows.pop(("loading", "scaler", "gpu", None), None)
    if not torch.cuda.is_available():
        assert gpu is not None and gpu["missing"] == "needs a GPU with nvJPEG: there is no CUDA device"
    assert {("loading", "scaler", "cpu", 1), ("training", "scaler", "cpu", 1)} < rows.keys()
    assert {("loading", STOCK, "cpu", 1), ("training", STOCK, "cpu", 1)} < rows.keys()
    for (part, *_), row in rows.items():
        assert len(row["blocks"]) == 2 * (1 + (part == "step")), "the step has its turn among the rest, too"
        assert row["images_per_second"] > 0 < row["images_per_cpu_second"]
        assert (row["data_wait"] is None) == (part != "training")
        assert row["data_wait"] is None or 0 < row["data_wait"] < 1
    advice = result["advice"]
    wanted = rows["step", "scaler", None, None]["images_per_second"]
    assert advice["wanted"] == wanted
    alone = rows["loading", STOCK, "cpu", 1]["images_per_second"]
    assert advice["cores"]["stock"] == 1 + workers_needed(wanted, {1: alone})
    assert (result["cores"], result["pictures"], result["source"]) == (1, 20, str(shards))
    text = said(result)
    assert "cores that takes, one for the training process: " in text and f"by {STOCK}" in text
    assert "recommended: data.num_workers=1 data.decode=" in text


def test_floats_come_in_the_dtype_and_memory_of_ours() -> None:
    x, other = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    found = feed._like(x, other)
    assert (found.dtype, found.stride()) == (other.dtype, other.stride()) and torch.equal(found, x.bfloat16())
    assert feed._like(x, x).stride() == x.stride()


@pytest.mark.parametrize("name", ["dinov2/demo", "simclr/demo", "supervised/demo"])
def test_views_of_stock_loading_come_where_ours_do(name: str) -> None:
    """What our step gets are these floats, in the order that its own augmentation has; the rest is unchanged."""
    recipe = load_recipe(name, overrides=[f"data.global_batch_size={M}"], shards="none")
    method: Any = build_method(recipe, world=World())
    batch = noise(method, M, world=World(), device=CPU)
    if name == "dinov2/demo":
        method.colors = {view: type(color)() for view, color in method.colors.items()}
    method.normalization = ((0.0,) * 3, (1.0,) * 3)
    ours = method.augment(batch, seed=0, step=0)
    floats = [copy / 255 for view in method.views for copy in batch["views"][view.name]]
    with feed._augmented(method, batch):
        theirs = method.augment({"floats": floats}, seed=0, step=0)
    assert theirs.keys() == ours.keys() and "augment" not in vars(method)
    if name == "dinov2/demo":
        for mine, their in zip(ours["crops"], theirs["crops"], strict=True):
            torch.testing.assert_close(their, mine)
        assert torch.equal(theirs["masks"], ours["masks"])
    else:
        assert torch.equal(theirs["images"], torch.cat(floats)) and theirs["images"].shape == ours["images"].shape


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    recipe = load_recipe("simclr/demo", overrides=[f"data.global_batch_size={M}"], shards="none")
    nowhere = Files(tmp_path, tmp_path, tmp_path)
    return feed._Bench(recipe, nowhere, CPU, seconds=0.3, rounds=1, say=lambda text: None)


def test_waits_and_rates_are_those_of_the_clock(bench: Any) -> None:
    """A source that takes 40 ms a batch and a step of 20 ms, or longer where the machine is busy."""
    waits, steps = list[float](), list[float]()

    def sleep(seconds: float, times: list[float]) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        times.append(time.perf_counter() - began)

    @contextmanager
    def slow() -> Iterator[Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            while True:
                sleep(0.04, waits)
                yield bench.noise

        yield batches()

    bench._step = lambda batch: sleep(0.02, steps)
    found = bench._train(slow, 2)
    count = found.block.count // M
    assert count % 2 == 0 and len(waits) == len(steps) == count + 4, "what two workers had ready comes first"
    waited, worked = sum(waits[4:]), sum(steps[4:])
    assert 0.25 <= waited + worked <= found.block.wall <= 1.3 * (waited + worked)
    assert waited / found.block.wall - 1e-3 <= found.wait <= 1.05 * waited / (waited + worked)
    waits.clear()
    alone = bench._load(slow, 2)
    count = alone.block.count // M
    assert len(waits) == count + 2 and sum(waits[2:]) <= alone.block.wall <= 1.3 * sum(waits[2:])
    assert alone.device_seconds is None


def test_decoding_on_the_device_is_added_up(bench: Any) -> None:
    class Event:
        def __init__(self, milliseconds: float) -> None:
            self.at = milliseconds

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    @contextmanager
    def decoding() -> Iterator[Iterator[Batch]]:
        yield ({"device_decode": (Event(i), Event(i + 4.0))} for i in itertools.count())

    assert bench._load(decoding, 1).device_seconds == pytest.approx(0.004 / M)


def rows(*, wanted: float, cpu: dict[int, float], gpu: dict[int, float], stock: dict[int, float]) -> list[Row]:
    made = [Row("step", "scaler", images_per_second=wanted)]
    for name, decode, curve in (("scaler", "cpu", cpu), ("scaler", "gpu", gpu), (STOCK, "cpu", stock)):
        for number, rate in curve.items():
            seconds = 1e-4 if decode == "gpu" else None
            row = Row("loading", name, decode, number, images_per_second=rate, device_seconds=seconds)
            made.append(row)
    return made


def test_advice_by_hand() -> None:
    curves: dict[str, Any] = {
        "cpu": {1: 400.0, 2: 800.0, 3: 1200.0, 4: 1250.0},  # the fourth has no core of its own
        "gpu": {1: 3000.0, 2: 5000.0},
        "stock": {3: 120.0, 4: 125.0},
    }
    fed = advise(rows(wanted=1000.0, **curves), num_cores=4)
    assert fed["cores"] == {"cpu": 4, "gpu": 2, "stock": 29}
    assert fed["delivered"] == {"cpu": 1200.0, "gpu": 7500.0, "stock": 120.0}
    assert (fed["gpu_decoding_pays"], fed["decode"], fed["num_workers"]) == (False, "cpu", 3)
    short = advise(rows(wanted=2000.0, **curves), num_cores=4)
    assert (short["gpu_decoding_pays"], short["decode"], short["num_workers"]) == (True, "gpu", 1)
    alone = advise(rows(wanted=2000.0, **{**curves, "gpu": {}}), num_cores=4)
    assert (alone["gpu_decoding_pays"], alone["decode"], alone["num_workers"]) == (False, "cpu", 3)
    assert alone["workers"]["cpu"] == 6


def test_gpu_decoding_is_charged_what_it_was_seen_to_cost() -> None:
    """The device is at it for 1 ms an image; whether that is time of the step shows where the step is fed by it."""
    found = rows(wanted=2000.0, cpu={3: 1200.0}, gpu={3: 9000.0}, stock={})
    found[-1].device_seconds = 1e-3  # 667 images/s, if it were all the step's
    assert not advise(found, num_cores=4)["gpu_decoding_pays"]
    for trained, pays in ((1800.0, True), (1100.0, False)):
        row = Row("training", "scaler", "gpu", 3, images_per_second=trained)
        assert advise([*found, row], num_cores=4)["gpu_decoding_pays"] == pays


def test_wrong_use_is_told(shards: Path) -> None:
    too_many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(ValueError, match=f"--cores {too_many}: this process may use 1 to {too_many - 1}"):
        measure("dinov2/demo", cores=too_many)
    with pytest.raises(ValueError, match="--workers 0,1: a number of loader processes is at least 1"):
        measure("dinov2/demo", workers=[0, 1])
    wrong = scaler("bench", "feed", "--workers", "one")
    assert wrong.returncode == 2 and "--workers 'one' is no list of numbers" in wrong.stderr


def test_cores_are_those_of_children_too() -> None:
    with feed._on(1) as number:
        inside = os.sched_getaffinity(0)
        with os.popen(f"{sys.executable} -c 'import os; print(len(os.sched_getaffinity(0)))'") as child:
            assert child.read().strip() == "1"
        assert number == len(inside) == torch.get_num_threads() == 1
