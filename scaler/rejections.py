"""Samples that could not be decoded and were replaced: gathered from all ranks, written, counted, limited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaler.collectives import World
from scaler.metrics import MetricsLog


class Rejections:
    """The rejected samples of a run.

    Args:
        world: the ranks whose loaders report.
        limit: distinct rejected samples above which the run stops.
    """

    def __init__(self, *, world: World, limit: int) -> None:
        self._world, self._limit = world, limit
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._ids: set[int] = set()
        self.count = 0

    def load(self, path: Path) -> None:
        """Take up the records that an earlier part of the run wrote to `path` (rejected.jsonl)."""
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        records = self._world.broadcast_object([record["id"] for record in records])
        self._ids, self.count = set(records), len(records)

    def add(self, step: int, batches: list[dict[str, Any]]) -> None:
        """Note what the loader reported with these micro-batches of `step`."""
        self._pending += [(step, record) for batch in batches for record in batch["rejected"]]

    @property
    def pending(self) -> int:
        """Records of this rank that no other rank knows of yet."""
        return len(self._pending)

    def exchange(self, log: MetricsLog) -> None:
        """Share pending records among all ranks and write them; every rank must call this together.

        Raises:
            ValueError: more distinct samples were rejected than the recipe allows.
        """
        found = [item for items in self._world.gather_objects(self._pending) for item in items]
        self._pending = []
        for step, record in sorted(found, key=lambda item: (item[0], item[1]["image"])):
            log.reject(step, [record])
            self._ids.add(record["id"])
        self.count += len(found)
        if len(self._ids) > self._limit:
            worst = found[-1][1]
            raise ValueError(
                f"{len(self._ids)} distinct samples could not be decoded, above the limit of {self._limit} "
                f"(data.max_bad_fraction of the data set, never under 10); the last: {worst['key']}: {worst['reason']};"
                " all are in rejected.jsonl: repair the shards or raise data.max_bad_fraction"
            )
