"""Fetches the shards that are needed next into the node's cache, in a process of its own beside each rank.

    with reading_ahead(index, needs, start=0, share=…, ahead=…) as advance:
        for batch in batches:
            advance(batch["image_number"])

It is a process because a thread would take the training process's time (the GIL), and started fresh rather than forked,
since it needs neither torch nor the model's memory. It knows the order by itself; all it is told is how far the
training is. The shards in its window (needed now, and soon) are held in the cache, and as many as fit into this rank's
share of the bound; the ranks of a node meet in the cache's locks, and each shard is fetched by one of them. It ends
with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from shards.cache import Download, Hold, Refusal
from shards.download import download
from shards.index import ShardIndex
from shards.order import ShardNeed
from shards.places import folder_at

_THREADS = 4  # downloads of a rank at a time
_TICK = 0.1  # seconds between two looks at how far the training is
_AGAIN = 0.5  # seconds until a shard that another process was fetching is looked for again
_PAUSE = 30.0  # seconds without attempts after the disk or the network failed
_GRACE = 30  # seconds that this process goes on after SIGTERM, as the loader's do
_ONE_BY_ONE = "samples that are not in the cache are read over the network one by one"
_MAX_SHARDS = 512  # held at a time; each costs a file descriptor


@dataclass(frozen=True)
class Job:
    """What the process is told when it starts.

    Attributes:
        needs: gives the shards in the order in which they are needed.
        share: bytes of the cache that this rank may hold (one shard in any case).
        ahead: shards to fetch before they are needed.
        parent: with whose process this one ends.
        position: descriptor of a file with the image that the parent has come to, eight bytes.
        message: descriptor of a file for the error that ends it all.
    """

    index: ShardIndex
    needs: Callable[[], Iterator[ShardNeed]]
    share: int
    ahead: int
    parent: int
    position: int
    message: int


@contextlib.contextmanager
def reading_ahead(
    index: ShardIndex | None, needs: Callable[[], Iterator[ShardNeed]], *, start: int, share: int, ahead: int
) -> Iterator[Callable[[int], None]]:
    """Fetch shards of `index` while the block runs; nothing to do for a local one, or for none.

    Gives a function to be told the image that the training has come to; it raises ValueError, naming the shard, when
    one is missing or damaged.
    """
    if index is None or index.cache is None:
        yield lambda image: None
        return
    with tempfile.TemporaryFile() as position, tempfile.TemporaryFile() as message, tempfile.TemporaryFile() as job:
        files = position.fileno(), message.fileno()
        _tell(files[0], start)
        pickle.dump(Job(index, needs, share, ahead, os.getpid(), *files), job)
        job.seek(0)  # a file, since a pipe would make us wait until the process has started
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
            stdin=job,
            pass_fds=files,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        ended = False

        def advance(image: int) -> None:
            nonlocal ended
            _tell(files[0], image)
            if process.poll() is not None and not ended:
                ended = True
                if text := os.pread(files[1], 1 << 16, 0).decode():
                    raise ValueError(text)
                what = f"the process that fetches shards ahead has ended ({process.returncode})"
                print(f"warning: {what}; {_ONE_BY_ONE}", file=sys.stderr, flush=True)

        try:
            yield advance
        finally:
            process.kill()  # at any moment: the cache bears that
            process.wait()


def _tell(position: int, image: int) -> None:
    os.pwrite(position, image.to_bytes(8, "little"), 0)


def main() -> None:
    """Read a `Job` from standard input, which its parent wrote, and do it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))  # the parent needs batches until it has saved
    job: Job = pickle.load(sys.stdin.buffer)
    try:
        Reader(job).run()
    except ValueError as error:
        os.pwrite(job.message, str(error).encode(), 0)
    os._exit(0)  # without waiting for downloads


class Reader:
    """The window of shards that are needed now and soon, and what is being done for each."""

    def __init__(self, job: Job) -> None:
        assert job.index.cache is not None
        self.job, self.index, self.cache = job, job.index, job.index.cache
        self.folder = folder_at(job.index.shards_at)
        self.needs = job.needs()
        self.next_need: ShardNeed | None = next(self.needs, None)
        self.window: list[ShardNeed] = []
        self.holds: dict[int, Hold] = {}
        self.running: dict[Future[Hold], int] = {}
        self.not_before: dict[int, float] = {}  # shard → when to look for it again
        self.paused_until = 0.0
        self.told: set[str] = set()
        self.pool = ThreadPoolExecutor(_THREADS)

    def run(self) -> None:
        """Until the parent is gone. `ValueError`: a shard is missing or damaged."""
        self.attempt(self.cache.trim)
        while os.getppid() == self.job.parent:
            position = int.from_bytes(os.pread(self.job.position, 8, 0), "little")
            self.move(position)
            self.fetch()
            if self.running:
                for future in wait(self.running, timeout=_TICK, return_when=FIRST_COMPLETED).done:
                    self.finish(future)
            else:
                time.sleep(_TICK)

    def move(self, position: int) -> None:
        """Let go of what is not needed any more, and take in what comes next, as far as share and distance allow."""
        self.window = [need for need in self.window if need.past > position]
        while self.next_need is not None and self.has_room(self.next_need, position):
            if self.next_need.past > position:
                self.window.append(self.next_need)
            self.next_need = next(self.needs, None)
        for shard in self.holds.keys() - self.shards():
            self.holds.pop(shard).release()

    def shards(self) -> dict[int, None]:
        """The shards of the window, in the order of need."""
        return dict.fromkeys(need.shard for need in self.window)

    def has_room(self, need: ShardNeed, position: int) -> bool:
        """Whether the next need may come into the window."""
        if need.past <= position:
            return True  # too late for it: it is passed over
        if sum(need.first > position for need in self.window) >= self.job.ahead:
            return False
        shards = self.shards()
        if need.shard in shards or not shards:
            return True
        taken = int(self.index.shard_bytes[[*shards, need.shard]].sum())
        return taken <= self.job.share and len(shards) < _MAX_SHARDS

    def fetch(self) -> None:
        """Hold what is there and start downloads of what is not, in the order of need."""
        now = time.monotonic()
        for shard in self.shards():
            if shard in self.holds or shard in self.running.values() or now < self.not_before.get(shard, 0.0):
                continue
            name, record = self.index.shard_cache_name(shard), self.index.shard_record(shard)
            if (hold := self.cache.hold(name)) is not None:
                self.holds[shard] = hold
                continue
            if len(self.running) >= min(_THREADS, self.folder.threads) or now < self.paused_until:
                continue
            self.not_before[shard] = now + _AGAIN
            reserved = self.attempt(lambda n=name, r=record: self.cache.reserve(n, r.num_bytes))  # type: ignore[misc]
            if isinstance(reserved, Download):
                self.running[self.pool.submit(self.bring, shard, reserved)] = shard
            elif reserved is Refusal.TOO_LARGE:
                self.tell(
                    f"shard {self.index.shard_path(shard)} of {record.num_bytes} bytes does not fit into the cache "
                    f"(bound {self.cache.max_bytes} bytes, if {self.cache.folder} has as many to spare): its samples "
                    "are read over the network one by one; raise data.cache_size, choose another data.cache_dir, or "
                    "make smaller shards"
                )
            elif reserved is Refusal.FULL:
                return  # what is needed later must not take the room first

    def bring(self, shard: int, reserved: Download) -> Hold:
        """Fetch a shard, and before it what says where its samples are: it is needed for reads by range too."""
        with reserved:
            self.index.fetch_offsets(shard)
            return download(reserved, self.folder, self.index.shard_record(shard))

    def finish(self, future: Future[Hold]) -> None:
        """Take over what a download has brought."""
        shard = self.running.pop(future)
        try:
            self.holds[shard] = future.result()
            self.not_before.pop(shard, None)
        except ValueError as error:
            if not isinstance(error.__cause__, OSError) or isinstance(
                error.__cause__, FileNotFoundError | PermissionError
            ):
                raise
            self.pause(str(error))  # nothing comes at all: those who need a sample of it decide what that means
        except OSError as error:
            self.pause(f"cannot write to the cache {self.cache.folder} ({error.strerror})")

    def attempt(self, act: Callable[[], object]) -> object:
        """`act()`, and a pause when the cache's folder fails."""
        try:
            return act()
        except OSError as error:
            self.pause(f"cannot write to the cache {self.cache.folder} ({error.strerror})")
            return None

    def pause(self, reason: str) -> None:
        """Read nothing ahead for a while."""
        self.paused_until = time.monotonic() + _PAUSE
        self.tell(f"{reason}: no shards are fetched ahead for now, and {_ONE_BY_ONE}")

    def tell(self, text: str) -> None:
        """Warn the user, once."""
        if text not in self.told:
            self.told.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)
