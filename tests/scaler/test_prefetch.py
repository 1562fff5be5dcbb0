"""Batches come one ahead, in order, with their errors, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scaler.methods.base import Batch
from scaler.prefetch import ahead, on_device
from shards.convert import convert
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import SampleOrder
from tests.images import make_image_folder


def numbers(count: int, closed: list[bool], made: list[int] | None = None) -> Generator[int, None, None]:
    try:
        for i in range(count):
            if made is not None:
                made.append(i)
            yield i
    finally:
        closed.append(True)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_items_come_in_order_and_the_thread_ends() -> None:
    closed: list[bool] = []
    assert list(ahead(numbers(50, closed))) == list(range(50))
    assert closed == [True] and "batches ahead" not in threads()


def test_the_next_item_is_made_while_one_is_in_use_and_no_more() -> None:
    made: list[int] = []
    items = ahead(numbers(50, [], made))
    assert next(items) == 0
    time.sleep(0.3)
    assert made == [0, 1, 2]  # one in use, one ready, one that waits to be put there
    items.close()


def test_closing_early_closes_what_it_reads() -> None:
    closed: list[bool] = []
    items = ahead(numbers(50, closed))
    next(items)
    items.close()
    assert closed == [True] and "batches ahead" not in threads()


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise ValueError("shard x.tar is missing")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="is missing"):
        next(items)
    assert "batches ahead" not in threads()


def batches(count: int) -> Iterator[Batch]:
    for i in range(count):
        pixels = torch.full((2, 4, 3, 8, 8), i, dtype=torch.uint8)
        yield {"views": {"v": pixels.pin_memory() if torch.cuda.is_available() else pixels}, "ids": torch.arange(4)}


def test_a_cpu_gets_the_batches_as_they_are() -> None:
    before = list(batches(3))
    after = list(on_device(iter(before), torch.device("cpu")))
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gets_the_same_pixels() -> None:
    for i, batch in enumerate(on_device(batches(20), torch.device("cuda", 0))):
        assert batch["views"]["v"].is_cuda and not batch["ids"].is_cuda
        assert (batch["views"]["v"].sum().item()) == i * batch["views"]["v"].numel()
        assert batch["transfer"][0].elapsed_time(batch["transfer"][1]) >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gpu_decodes_what_is_left_to_it(tmp_path: Path, num_workers: int) -> None:
    """Samples and labels are the workers', pixels nearly; the step's stream waits for them."""
    make_image_folder(tmp_path / "images", num_images=48, size=64, format="mixed")
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    index, device = ShardIndex.load(tmp_path / "shards"), torch.device("cuda", 0)
    order = SampleOrder(index.shard_sizes, seed=1, lanes=2, shuffle_window=8)
    options: dict[str, Any] = {"views": [View("v", 32, count=2)], "seed": 3, "num_workers": num_workers, "stop": 96}
    options |= {"global_batch_size": 12, "micro_batch_size": 12}
    notes: list[str] = []
    loaders = (ShardLoader(index, order, **options, decode=decode) for decode in ("gpu", "cpu"))
    found, expected = (on_device(iter(loader), device, say=notes.append) for loader in loaders)
    for one, other in zip(found, expected, strict=True):
        ours, theirs = one["views"]["v"], other["views"]["v"]
        difference = (ours.int() - theirs.int()).abs().float()  # on this stream, without any other wait
        assert torch.equal(one["ids"], other["ids"]) and torch.equal(one["labels"], other["labels"])
        assert ours.shape == theirs.shape and difference.mean().item() <= 4.0
        assert one["device_decode"][0].elapsed_time(one["device_decode"][1]) > 0 and "encoded" not in one
        assert one["ready"].query() and "device_decode" not in other
    assert len(notes) == 1 and "images are decoded on cuda:0 and cut by kernels, the others by the workers" in notes[0]
