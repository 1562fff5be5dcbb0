"""Every strategy × method × variant × number of processes against the single process: 20 steps, clipping active.

    python -m tests.distributed.matrix --out matrix.md                    # fp32: all columns of metrics.jsonl
    python -m tests.distributed.matrix --precision bf16 --out bf16.md     # the loss

Prints a line a run and writes the table; a representative part of it is in the default tests (test_train.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaler.collectives import World
from tests.distributed.helper import run_distributed
from tests.runs import BATCH, make_shards, rows, train_job, write_recipe

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
LAYOUTS: dict[str, tuple[list[str], list[int]]] = {
    "ddp": (["strategy.name=ddp"], [1, 2, 3]),
    "fsdp2": (["strategy.name=fsdp2"], [1, 2, 3]),
    "fsdp2 hybrid": (["strategy.name=fsdp2", "strategy.shard_group=2"], [4]),
    "zero1": (["strategy.name=zero1"], [1, 2, 3]),
    "zero2": (["strategy.name=zero2"], [1, 2, 3]),
    "zero3": (["strategy.name=zero3"], [1, 2, 3]),
}
METHODS = ["simclr", "dinov2", "supervised", "supervised_cnn"]
VARIANTS = ["plain", "checkpointing", "accumulation"]


def cells() -> Iterator[tuple[str, str, int, str]]:
    """(method, layout, ranks, variant) of the whole matrix; the single process itself is left out."""
    for method in METHODS:
        for layout, (_, sizes) in LAYOUTS.items():
            for ranks in sizes:
                for variant in VARIANTS:
                    if (layout, ranks, variant) == ("ddp", 1, "plain"):
                        continue
                    if (method, variant) != ("supervised_cnn", "accumulation"):  # batch norm: refused by name
                        yield method, layout, ranks, variant


def write_cell(folder: Path, shards: Path, cell: tuple[str, str, int, str], *extra: str) -> tuple[str, list[str]]:
    """The recipe of a cell, for a run in `folder`/run, and its overrides."""
    method, layout, ranks, variant = cell
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "run.yaml", method, shards=shards)
    micro = BATCH // ranks // (2 if variant == "accumulation" else 1)
    overrides = [*LAYOUTS[layout][0], f"strategy.micro_batch_size={micro}", *extra]
    if variant == "checkpointing":
        overrides.append("strategy.activation_checkpointing=blocks")
    return str(recipe), overrides


def train_cell(folder: Path, shards: Path, cell: tuple[str, str, int, str], *extra: str) -> list[dict[str, Any]]:
    """Run a cell of the matrix in `folder`; returns its rows."""
    run_distributed(train_job, cell[2], *write_cell(folder, shards, cell, *extra))
    return rows(folder / "run")


def train_all(world: World, jobs: list[tuple[str, list[str]]]) -> None:
    """Runs one after the other in the same processes, which saves their start."""
    for recipe, overrides in jobs:
        train_job(world, recipe, overrides)


def largest_difference(
    got: list[dict[str, Any]], wanted: list[dict[str, Any]], *, keys: set[str] | None = None
) -> tuple[float, str, int]:
    """The largest relative difference of two curves, and its column and step; values under 1e-3 count absolutely."""
    assert len(got) == len(wanted) == 20
    assert all(a.keys() == b.keys() for a, b in zip(got, wanted, strict=True))
    assert all(row["grad_norm"] > 0.1 for row in wanted), "clipping must be active"
    return max(
        (abs(a[key] - b[key]) / max(abs(b[key]), 1e-3), key, b["step"])
        for a, b in zip(got, wanted, strict=True)
        for key in keys or b
    )


def table(found: dict[tuple[str, int, str], dict[str, str]], methods: list[str]) -> str:
    """Markdown, a row for each layout and variant."""
    lines = [["layout", "processes", "variant", *methods], ["---"] * (3 + len(methods))]
    lines += [[*map(str, key), *(texts.get(method, "–") for method in methods)] for key, texts in found.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Run the matrix; exit code 1 if a cell is out of tolerance."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    keys = {"loss"} if arguments.precision == "bf16" else None
    found: dict[tuple[str, int, str], dict[str, str]] = {}
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name))
        extra = f"strategy.precision={arguments.precision}"
        references = {m: train_cell(Path(name, m), shards, (m, "ddp", 1, "plain"), extra) for m in METHODS}
        by_processes = itertools.groupby(sorted(cells(), key=lambda c: (c[2], c[1])), key=lambda c: (c[2], c[1]))
        for (ranks, layout), group in by_processes:
            folders = {cell: Path(name, "-".join(map(str, cell)).replace(" ", "-")) for cell in group}
            began = time.monotonic()
            jobs = [write_cell(folder, shards, cell, extra) for cell, folder in folders.items()]
            try:
                run_distributed(train_all, ranks, jobs, timeout=1200)
            except (RuntimeError, TimeoutError) as error:
                print(str(error)[-2000:], file=sys.stderr)
            for cell, folder in folders.items():
                method, _, _, variant = cell
                try:
                    difference, column, step = largest_difference(rows(folder / "run"), references[method], keys=keys)
                except (OSError, AssertionError):
                    difference, column, step = float("inf"), "failed", 0
                worst = max(worst, difference)
                found.setdefault((layout, ranks, variant), {})[method] = f"{difference:.1e}"
                print(*cell, f"{difference:.1e} {column} {step}", sep="  ", file=sys.stderr, flush=True)
            print(f"{layout} on {ranks}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            arguments.out.write_text(table(found, METHODS))
    return int(worst > TOLERANCE[arguments.precision])


if __name__ == "__main__":
    sys.exit(main())
