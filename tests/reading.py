"""Processes that read shards as the ranks of a training do; `python -m tests.reading` is one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from shards.cache import ShardCache
from shards.convert import convert
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import SampleOrder
from tests.images import make_image_folder

ROOT = Path(__file__).parents[1]
STOP = 480  # images


def small_shards(folder: Path, *, num_images: int) -> Path:
    """Shards of some 20 pictures."""
    make_image_folder(folder / "images", num_images=num_images, size=40)
    convert(folder / "images", folder / "shards", shard_size=40_000, workers=1)
    return folder / "shards"


def make_loader(index: ShardIndex, *, rank: int, ranks: int, ranks_per_node: int, workers: int) -> ShardLoader:
    """Four lanes, batches of 16."""
    return ShardLoader(
        index,
        SampleOrder(index.shard_sizes, seed=1, lanes=4, shuffle_window=10),
        views=[View("a", 24)],
        seed=0,
        global_batch_size=16,
        micro_batch_size=16 // ranks,
        rank=rank,
        world_size=ranks,
        ranks_per_node=ranks_per_node,
        num_workers=workers,
        stop=STOP,
    )


def lines(loader: ShardLoader) -> Iterator[str]:
    """Of each micro-batch its image number, the ids and the crc32 of the pixels."""
    for batch in loader:
        pixels = zlib.crc32(batch["views"]["a"].numpy().tobytes())
        yield " ".join(map(str, [batch["image_number"], *batch["ids"].tolist(), pixels]))
    yield "end"


class Rank:
    """A running rank; what it prints goes to files."""

    def __init__(self, arguments: tuple[object, ...], *, prefix: tuple[str, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rank-")
        environment = {"SCALER_REMOTE_SECONDS": "20", **os.environ, "OMP_NUM_THREADS": "1"}
        words = [str(argument) for argument in (self._folder.name, *arguments)]
        self._process: subprocess.Popen[bytes] | multiprocessing.process.BaseProcess
        if prefix:
            command = [*prefix, sys.executable, "-m", __name__, *words]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        else:
            context = multiprocessing.get_context("forkserver")  # torch is imported once, not by each rank
            context.set_forkserver_preload([__name__])
            self._process = context.Process(target=_main, args=(words, environment))
            self._process.start()
        self.pid = int(self._process.pid or 0)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None if isinstance(self._process, subprocess.Popen) else self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        if isinstance(self._process, subprocess.Popen):
            self._process.wait(120)
        else:
            self._process.join(120)
        assert not self.running(), "it hangs"

    def read_to_end(self, folder: Path, *, rank: int = 0, ranks: int = 1) -> str:
        """What it warned of; its stream is that of the local folder."""
        self.wait()
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        loader = make_loader(ShardIndex.load(folder), rank=rank, ranks=ranks, ranks_per_node=1, workers=0)
        assert out.splitlines() == list(lines(loader)), err
        assert "Traceback" not in err, err
        return err


def start_reading(
    where: object,
    cache: Path,
    *,
    bound: int = 1 << 30,
    rank: int = 0,
    ranks: int = 1,
    ranks_per_node: int = 1,
    workers: int = 0,
    pause: float = 0.02,
    prefix: tuple[str, ...] = (),
) -> Rank:
    """Start a rank; `prefix` are words before its command. It waits `pause` seconds after each micro-batch."""
    return Rank((where, cache, bound, rank, ranks, ranks_per_node, workers, pause), prefix=prefix)


def _main(words: list[str], environment: dict[str, str]) -> None:
    folder, where, cache, bound, rank, ranks, ranks_per_node, workers, pause = words
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    index = ShardIndex.load(where, cache=ShardCache(cache, max_bytes=int(bound)))
    for line in lines(
        make_loader(index, rank=int(rank), ranks=int(ranks), ranks_per_node=int(ranks_per_node), workers=int(workers))
    ):
        print(line, flush=True)
        time.sleep(float(pause))


if __name__ == "__main__":
    _main(sys.argv[1:], dict(os.environ))
