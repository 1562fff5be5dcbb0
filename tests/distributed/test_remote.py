"""Four ranks on two nodes read shards over a network: what they fetch, and that it is what a local run reads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.index import ShardIndex
from shards.loader import rank_lanes
from tests.http import Nginx, free_port, nginx
from tests.long import only_long
from tests.reading import ROOT, STOP, Rank, make_loader, small_shards, start_reading
from tests.runs import make_shards, rows, write_recipe
from tests.s3 import rclone_server, use_s3

RANKS, NODES = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("data"), num_images=300)


@contextlib.contextmanager
def served(folder: Path, kind: str) -> Iterator[tuple[Nginx, str]]:
    """The folder behind nginx, and its URL: as it is, or as S3 by rclone with nginx before it, whose log counts."""
    if kind == "http":
        with nginx(folder) as server:
            yield server, server.url
        return
    before = dict(os.environ)
    with rclone_server(folder.parent) as endpoint:
        proxy = f"location / {{ proxy_pass {endpoint}; proxy_set_header Host $http_host; proxy_buffering off; }}"
        with nginx(folder, extra=proxy) as server:
            use_s3(server.url)
            try:
                yield server, f"s3://{folder.name}"
            finally:
                os.environ.clear()
                os.environ |= before


def start_ranks(url: str, caches: list[Path], *, pause: float) -> list[Rank]:
    per_node = RANKS // NODES
    options = {"ranks": RANKS, "ranks_per_node": per_node, "pause": pause}
    return [start_reading(url, caches[i // per_node], rank=i, workers=i % 2, **options) for i in range(RANKS)]


def needed(index: ShardIndex, node: int) -> set[str]:
    """The shards that a node's ranks read."""
    found = set()
    for rank in range(node * RANKS // NODES, (node + 1) * RANKS // NODES):
        loader = make_loader(index, rank=rank, ranks=RANKS, ranks_per_node=1, workers=0)
        lanes = rank_lanes(loader.order, loader.global_batch_size, rank=rank, world_size=RANKS)
        found |= {index.shard_names[need.shard] for need in loader.order.shard_needs(0, stop=STOP, lanes=lanes)}
    return found


def downloads(server: Nginx, index: ShardIndex) -> Counter[str]:
    """How often each shard was sent whole; these shards are smaller than one part of a download."""
    sizes = dict(zip(index.shard_names, index.shard_bytes.tolist(), strict=True))
    names = ((request.path.rpartition("/")[2], request.sent) for request in server.requests())
    return Counter(name for name, sent in names if sizes.get(name) == sent)


@pytest.mark.parametrize("kind", ["http", pytest.param("s3", marks=only_long)])
def test_each_node_fetches_each_shard_once(folder: Path, tmp_path: Path, kind: str) -> None:
    index, caches = ShardIndex.load(folder), [tmp_path / "node0", tmp_path / "node1"]
    with served(folder, kind) as (server, url):
        for rank, process in enumerate(start_ranks(url, caches, pause=0.1)):
            process.read_to_end(folder, rank=rank, ranks=RANKS)
        found = downloads(server, index)
    kept = Counter[str]()
    for node, cache in enumerate(caches):
        names = [name for i, name in enumerate(index.shard_names) if cache.joinpath(index.shard_cache_name(i)).exists()]
        wanted = needed(index, node)
        assert set(names) <= wanted and len(names) > len(wanted) / 2, "what was over before it came is not fetched"
        assert len(list(cache.glob("*.tar"))) == len(names) and not list(cache.glob("*.partial"))
        kept.update(names)
    assert found == kept and max(found.values()) <= NODES


def test_a_server_that_is_killed_restarted_and_slow(folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(folder)
    with served(folder, "http") as (server, url):
        ranks = start_ranks(url, [tmp_path / "node0", tmp_path / "node1"], pause=0.02)
        deadline = time.monotonic() + 60
        while len(server.requests()) < 60 and time.monotonic() < deadline:
            time.sleep(0.02)
        server.kill()
        time.sleep(1.0)
        server.extra = "limit_rate 40k;"
        server.start()
        for rank, process in enumerate(ranks):
            process.read_to_end(folder, rank=rank, ranks=RANKS)
        assert max(downloads(server, index).values()) <= NODES


@only_long
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_training_over_two_nodes_is_the_local_one(tmp_path: Path, kind: str) -> None:
    """torchrun on two nodes of two processes, each node with a cache of its own, against one local process."""
    shards = make_shards(tmp_path)
    schedule = {"total": "12 steps", "warmup": "2 steps"}
    recipe = write_recipe(tmp_path / "recipe.yaml", "supervised", shards=shards, schedule=schedule)
    common = ["-m", "scaler.train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *common, f"run.dir={tmp_path}/local"], check=True, env=environment, cwd=ROOT)
    with served(shards, kind) as (server, url):
        port = free_port()
        nodes = []
        for node in range(NODES):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                        "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]  # fmt: skip
            options = [f"run.dir={tmp_path}/remote", f"data.shards={url}", f"data.cache_dir={tmp_path}/cache{node}"]
            options += ["data.cache_size=1GB", "data.num_workers=1", "strategy.name=ddp"]
            nodes.append(subprocess.Popen([*torchrun, *common, *options], env={**environment, **os.environ}, cwd=ROOT))
        assert [process.wait(timeout=300) for process in nodes] == [0, 0]
        assert 1 <= max(downloads(server, ShardIndex.load(shards)).values()) <= NODES
    for local, remote in zip(rows(tmp_path / "local"), rows(tmp_path / "remote"), strict=True):
        assert remote["loss"] == pytest.approx(local["loss"], rel=1e-4)
