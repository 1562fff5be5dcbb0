"""Who hangs? Every process says how far it is, and a silent wait ends with the names of those that all others wait for.

    with Watch(timeout=1800) as watch:
        watch.beat("data", step=17)                     # cheap; wherever the run has come a bit further
        watch.share(rank=3, world_size=8, store=store, folder=run_dir)      # from here on, peers and people see it

The rule is one for all phases, be it a start, a compilation, a step or a save: a process hangs when it has not beaten
for `timeout` seconds. Then it looks at the others. All ranks beat at the same places of the same program, so those with
the fewest beats are the ones that the rest waits for, unless some do not answer at all (stopped, out of memory, machine
or network gone), who are worse. While the least advanced still move nothing is done. Otherwise the lowest rank that can
still speak names them on stderr and in RUN/hang.json, with the stacks of all, and every process ends with code 1, so
that the launcher can start the group again. Time in which a process was itself suspended does not count, nor does a
rendezvous store that is gone for less than `timeout`.

Two threads, since the store may never answer: one talks (to the store and to RUN/heartbeat, whose files' ages tell a
liveness probe that the process is alive), one guards and never waits for anything.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from torch.distributed import Store  # type: ignore[attr-defined]

Record = dict[str, Any]

_FILE_SECONDS = 5.0  # between two writings of a heartbeat file
_LAST_WORDS = 5.0  # seconds for writing the report, whose disk may be what hangs
_SHOWN = 4  # ranks that are named one by one
_OWN = tuple(str(Path(__file__).parents[1] / room) + os.sep for room in ("scaler", "shards"))


@dataclass(frozen=True)
class Beat:
    """How far this process is: beats so far, and where the last one was."""

    count: int
    phase: str
    step: int


@dataclass
class _Heard:
    """What the talking thread has found out, replaced as a whole."""

    records: dict[int, Record] = field(default_factory=dict)  # by rank; those that were ever heard of
    silent: frozenset[int] = frozenset()  # ranks that have said nothing new for `patience`
    stacks: dict[int, Record] = field(default_factory=dict)
    seconds: float = 0.0  # for how long the peers have been listened to


class Watch:
    """Watches this process, and its peers once `share` has said where they are; active while its `with` lasts.

    Args:
        timeout: seconds without a beat after which a process hangs.
        rank: what this process calls itself until `share` tells.
    """

    def __init__(self, *, timeout: float, rank: int = 0) -> None:
        self.rank, self.world_size, self.timeout = rank, 1, timeout
        self._on_end: Callable[[str], None] = lambda line: None
        self._interval = min(max(timeout / 20, 0.1), 1.0)
        self._patience = max(3.0, timeout / 60)  # until a peer that says nothing new counts as silent
        self._long = max(timeout - self._patience, timeout / 2)  # what a peer's clock must show to agree with ours
        self._beat, self._quiet = Beat(0, "start", 0), 0.0
        self._host, self._main = socket.gethostname(), threading.main_thread().ident
        self._store: Store | None = None
        self._folder: Path | None = None
        self._contacts, self._store_error = 0, ""
        self._stalled, self._heard = False, _Heard()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True, name="watch") for run in (self._guard, self._talk)]

    def beat(self, phase: str, *, step: int = 0) -> None:
        """This process has come so far; `step` counts from 1, 0 is outside of the steps."""
        self._beat = Beat(self._beat.count + 1, phase, step)

    def share(
        self,
        *,
        rank: int,
        world_size: int,
        store: Store | None,
        folder: Path,
        on_end: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Publish beats to peers, and to `folder`/heartbeat for people and probes; reports go to `folder`, too.

        Args:
            rank, world_size: this process among those that beat together.
            store: where they meet; None: it is not watched by others and watches none.
            on_end: called with the report's first line just before this process ends itself.
        """
        self.rank, self.world_size, self._on_end = rank, world_size, on_end
        self._folder, self._store = folder, store if world_size > 1 else None

    def where(self) -> str:
        """Rank, host, phase and step of this process, for messages."""
        record = self._record()
        return f"{_who(record)} in {_phase(record)}"

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2)  # the talking one may be stuck in the store

    # ------------------------------------------------------------------ the thread that guards

    def _guard(self) -> None:
        seen, contacts, unreached, before = self._beat, -1, 0.0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self._interval), now  # a suspended process does not age
            if self._beat is not seen:
                seen, self._quiet, self._stalled, self._heard = self._beat, 0.0, False, _Heard()
            else:
                self._quiet += elapsed
            if self._contacts != contacts:
                contacts, unreached = self._contacts, 0.0
            elif self._store is not None:
                unreached += elapsed
            if unreached >= self.timeout or (self._stalled and unreached >= 2 * self._patience):
                self._end([f"{self.where()}: the rendezvous store has not answered for {_duration(unreached)}"
                           f"{self._store_error and f' ({self._store_error})'}: its machine or process is gone, or the "
                           "network is"])  # fmt: skip
            if self._quiet < self.timeout:
                continue
            self._stalled = True
            if self._store is None:
                self._end([_describe(self._record(), self._stack())])
            heard = self._heard
            if heard.seconds < self._patience:
                continue
            if hanging := who_hangs(heard.records, heard.silent, timeout=self._long):
                if self._speaker(heard.records, heard.silent) != self.rank:
                    time.sleep(2 * self._patience)  # the launcher ends all as soon as one has ended
                    os._exit(1)
                self._end(self._report(hanging, heard))

    def _report(self, hanging: list[int], heard: _Heard) -> list[str]:
        lines = []
        for rank in hanging[:_SHOWN]:
            record = heard.records.get(rank)
            if record is None:
                lines.append(f"rank {rank} has never been heard of")
            elif rank in heard.silent:
                lines.append(
                    f"{_who(record)} (process {record['pid']}) does not answer; when last heard of it was in "
                    f"{_phase(record)}: it is stopped, or its machine or network is gone"
                )
            else:
                lines.append(_describe(record, heard.stacks.get(rank, {})))
        if len(hanging) > _SHOWN:
            lines.append(f"and {len(hanging) - _SHOWN} more of {self.world_size} ranks; all are in hang.json")
        return lines

    def _end(self, lines: list[str]) -> None:
        """Say who hangs and end this process; the report's disk gets some seconds."""
        for line in lines:
            print(f"error: {line}", file=sys.stderr, flush=True)
        heard = self._heard
        writer = threading.Thread(target=self._write_report, args=(lines, heard), daemon=True)
        writer.start()
        writer.join(timeout=_LAST_WORDS)
        os._exit(1)

    def _write_report(self, lines: list[str], heard: _Heard) -> None:
        mine = {**self._record(), **self._stack()}
        others = [{**record, **heard.stacks.get(rank, {})} for rank, record in sorted(heard.records.items())]
        report = {
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "timeout_seconds": self.timeout,
            "hang": lines,
            "silent": sorted(heard.silent),
            "ranks": [mine if record["rank"] == self.rank else record for record in others] or [mine],
        }
        if self._folder is not None:
            _write_json(self._folder / "hang.json", report)
        self._on_end(lines[0])

    # ------------------------------------------------------------------ the thread that talks

    def _talk(self) -> None:
        channel: Store | None = None
        listening_since, written = time.monotonic(), -_FILE_SECONDS
        changes: dict[int, tuple[int, float]] = {}  # rank → the newest number that it sent, and since when we know it
        number = 0
        while not self._closed.wait(self._interval):
            number, now = number + 1, time.monotonic()
            record = {**self._record(), "number": number}
            if self._folder is not None and now - written >= _FILE_SECONDS:
                written = now
                self._write_heartbeat(self._folder, record)
            if self._store is None:
                continue
            try:
                channel = channel or self._store.clone()  # a connection of its own: others' waits do not block it
                channel.set(f"beat/{self.rank}", json.dumps(record))
                if not self._stalled:
                    channel.check([f"beat/{self.rank}"])  # an answer shows that the store is there
                    listening_since, changes, self._heard = now, {}, _Heard()
                else:
                    channel.set(f"stack/{self.rank}", json.dumps(self._stack()))
                    self._heard = self._listen(channel, changes, since=listening_since)
                self._contacts += 1
            except RuntimeError as error:  # torch's network and store errors
                channel, self._store_error = None, str(error).splitlines()[0]

    def _listen(self, channel: Store, changes: dict[int, tuple[int, float]], *, since: float) -> _Heard:
        records: dict[int, Record] = _read_all(channel, "beat", self.world_size)
        now = time.monotonic()
        for rank in range(self.world_size):
            number = records[rank]["number"] if rank in records else 0
            if rank not in changes or changes[rank][0] != number:
                changes[rank] = number, now
        silent = frozenset(rank for rank, (_, at) in changes.items() if now - at >= self._patience)
        speaks = self._speaker(records, silent) == self.rank
        stacks = _read_all(channel, "stack", self.world_size) if speaks else {}
        return _Heard(records, silent, stacks, now - since)

    def _speaker(self, records: dict[int, Record], silent: frozenset[int]) -> int:
        """The lowest of the ranks that have noticed the hang."""
        return min((r for r in records.keys() - silent if records[r]["quiet"] >= self._long), default=self.rank)

    def _record(self) -> Record:
        beat = self._beat
        return {
            "rank": self.rank,
            "host": self._host,
            "pid": os.getpid(),
            "phase": beat.phase,
            "step": beat.step,
            "count": beat.count,
            "quiet": round(self._quiet, 1),
        }

    def _stack(self) -> Record:
        """Where the main thread is, and what its children (the loader's workers) do."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
        own = [f for f in stack if f.filename.startswith(_OWN)] or list(stack[-1:])
        children = []
        for child in psutil.Process().children():
            try:
                cpu = child.cpu_times()
                children.append({"pid": child.pid, "status": child.status(), "cpu_seconds": cpu.user + cpu.system})
            except psutil.Error:
                continue
        return {
            "at": f"{own[-1].filename}:{own[-1].lineno} {own[-1].name}" if own else "unknown",
            "in": f"{stack[-1].filename}:{stack[-1].lineno} {stack[-1].name}" if stack else "unknown",
            "stack": [line for entry in stack.format() for line in entry.rstrip().split("\n")],
            "children": children,
        }

    def _write_heartbeat(self, folder: Path, record: Record) -> None:
        try:
            (folder / "heartbeat").mkdir(parents=True, exist_ok=True)
            _write_json(folder / "heartbeat" / f"rank-{self.rank:05d}.json", record)
        except OSError:  # a full disk is for the checkpoints to complain about, and this file's age is the message
            pass


def who_hangs(records: dict[int, Record], silent: frozenset[int], *, timeout: float) -> list[int]:
    """The ranks that all others wait for, or none while these still move.

    Args:
        records: the last word of every rank: how often it has beaten (`count`), and for how many seconds not (`quiet`).
        silent: ranks whose watch does not answer.
    """
    if silent:
        return sorted(silent)
    least = min(record["count"] for record in records.values())
    behind = sorted(rank for rank, record in records.items() if record["count"] == least)
    return behind if all(records[rank]["quiet"] >= timeout for rank in behind) else []


def _describe(record: Record, stack: Record) -> str:
    at, inside = stack.get("at", "unknown"), stack.get("in", "unknown")
    line = f"{_who(record)} hangs in {_phase(record)} for {_duration(record['quiet'])}: {at}"
    return line + (f" (in {inside})" if inside != at else "")


def _who(record: Record) -> str:
    return f"rank {record['rank']} on {record['host']}"


def _phase(record: Record) -> str:
    return f"phase {record['phase']!r}" + (f" of step {record['step']}" if record["step"] else "")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _read_all(channel: Store, name: str, size: int) -> dict[int, Record]:
    """The words of all ranks that have said any."""
    ranks, keys = list(range(size)), [f"{name}/{rank}" for rank in range(size)]
    if not channel.check(keys):  # asking for a missing one would wait for it
        ranks = [rank for rank in ranks if channel.check([keys[rank]])]
    values = channel.multi_get([keys[rank] for rank in ranks]) if ranks else []
    return {rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)}


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
