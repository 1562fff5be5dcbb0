"""What our loop costs beside the computation: against a bare loop, a logged row, and Python's garbage collection.

    scaler bench loop dinov2/demo
    scaler bench loop dinov2/vits16_in1k strategy.micro_batch_size=64 data.global_batch_size=64 --steps 20

Ours is `scaler.loop.train` with all that a run has (metrics, progress, watch, agreement, meters, signals, rejections)
on noise that lies in memory. The bare one makes the same method calls, backward, update and average, and nothing else.
They take turns of some steps in one process: the bare loop's turn comes when ours begins a step.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from scaler.bench.rounds import Block, ratio
from scaler.bench.stepper import noise
from scaler.bench.syncs import as_line, counted, host_syncs
from scaler.checkpoint import Checkpointer
from scaler.collectives import World
from scaler.layout import batch_layout
from scaler.loop import Progress, train
from scaler.machine import MachineMeter
from scaler.methods.base import Batch
from scaler.metrics import MetricsLog
from scaler.optimizers import build_optimizer
from scaler.prefetch import on_device
from scaler.recipe import Recipe, load_recipe
from scaler.rejections import Rejections
from scaler.signals import StopSignals
from scaler.strategies import Strategy
from scaler.strategies.ddp import DDP
from scaler.strategies.launcher import resolve_strategy
from scaler.throughput import Supply
from scaler.timetable import Timetable
from scaler.train import build_method, make_plan
from scaler.watch import Watch

_WARM_UP = 8  # steps of ours before the first turn; the bare loop's first turn is one, too
_PROFILED = 4  # steps at the end, whose waits for the device are counted
_ROWS = 100  # that are logged to see what one costs
_OUTSIDE = ("data", "log", "agree")  # phases of our loop without computation
_TRACKERS = {"tensorboard": "track.tensorboard=true", "wandb": "track.wandb=offline"}
_NUM_SAMPLES = 1_281_167  # images of an epoch, for schedules in epochs


def measure(
    name: str,
    *,
    overrides: Sequence[str] = (),
    steps: int = 10,
    rounds: int = 6,
    trackers: Sequence[str] = ("tensorboard",),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a recipe's method on this process's device, by turns in our loop and in a bare one.

    Args:
        name: path or short name; its global batch is trained on by this process alone, by DDP, without trackers.
        overrides: `key=value` words.
        steps: of a turn.
        rounds: turns of each.
        trackers: whose rows are also timed: tensorboard, wandb.

    Returns:
        `step_ms` of both, `overhead` (ours over bare, minus one; by the wall clock and by processor time), `outside_ms`
        of a step by phase, `row_ms` of a logged row by trackers, `collection` (Python's, in milliseconds),
        `host_syncs` of the profiled steps by place, and how many of these were logged.

    Raises:
        ValueError: recipe and machine do not fit together.
    """
    for tracker in trackers:
        if tracker not in _TRACKERS:
            raise ValueError(f"no tracker {tracker!r}; valid names: {', '.join(_TRACKERS)}, or none")
    total = _WARM_UP + steps * rounds + _PROFILED
    fixed = [
        "strategy.name=ddp",
        f"schedule.total={total} steps",
        "run.stop_after=null",
        "checkpoint.every=1000000000 steps",
        "track.tensorboard=false",
        "track.wandb=disabled",
        "track.mlflow=false",
    ]
    recipe = load_recipe(name, overrides=[*overrides, *fixed], shards="none")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    layout = batch_layout(
        recipe.data.global_batch_size, micro_batch_size=resolve_strategy(recipe.strategy).micro_batch_size, ranks=1
    )
    turns = _Turns(
        Bare(recipe, device, num_micro_batches=layout.num_micro_batches, micro_batch_size=layout.micro_batch_size),
        device,
        steps=steps,
        rounds=rounds,
        say=say,
    )
    with tempfile.TemporaryDirectory(prefix="scaler-bench-") as folder:
        method, strategy = prepared(recipe, device)
        timetable, world, run_dir = Timetable(recipe, num_samples=_NUM_SAMPLES), World(), Path(folder)
        layouts = {recipe.data.global_batch_size: layout}
        log = _log(recipe, run_dir, total_steps=total, symptoms=method.symptoms)
        machine = MachineMeter(device)
        with log, turns, contextlib.closing(machine):
            turns.share(rank=0, world_size=1, store=None, folder=run_dir)
            train(
                plan=make_plan(recipe, timetable=timetable, layouts=layouts),
                progress=Progress(),
                method=method,
                strategy=strategy,
                loader=batches(method, device, layout.num_micro_batches, layout.micro_batch_size),
                validation=None,
                checkpointer=Checkpointer(run_dir, world=world, keep_last=1),
                checkpoint_info=dict,
                rejections=Rejections(world=world, limit=10),
                log=log,
                machine=machine,
                signals=StopSignals(),
                watch=turns,
                world=world,
                device=device,
            )
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        row_ms = {"no tracker": time_row(recipe, run_dir / "none", row)}
        for tracker in trackers:
            tracked = load_recipe(name, overrides=[*overrides, *fixed, _TRACKERS[tracker]], shards="none")
            row_ms[tracker] = time_row(tracked, run_dir / tracker, row)
    ours, bare = turns.blocks["ours"], turns.blocks["bare"]
    logged = [step for step in range(total - _PROFILED + 1, total + 1) if timetable.due(recipe.track.log_every, step)]
    return {
        "recipe": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "log_every": recipe.track.log_every,
        "rounds": rounds,
        "steps": steps,
        "step_ms": {
            kind: 1000 * statistics.median(b.wall / b.count for b in blocks) for kind, blocks in turns.blocks.items()
        },
        "overhead": {"wall": 1 / ratio(ours, bare, "wall") - 1, "cpu": 1 / ratio(ours, bare, "cpu") - 1},
        "overhead_by_round": [a.wall / b.wall - 1 for a, b in zip(ours, bare, strict=True)],
        "outside_ms": {name: 1000 * statistics.fmean(turns.seconds[name]) for name in _OUTSIDE},
        "row_ms": row_ms,
        "collection": turns.collection(),
        "profiled_steps": _PROFILED,
        "logged_steps": len({*logged, total}),
        "host_syncs": dict(turns.syncs),
    }


class Bare:
    """A training loop as anybody would write it: the computation of a step, and nothing around it."""

    def __init__(self, recipe: Recipe, device: torch.device, *, num_micro_batches: int, micro_batch_size: int) -> None:
        self.method, self.strategy = prepared(recipe, device)
        self.batches = on_device(batches(self.method, device, num_micro_batches, micro_batch_size), device)
        self.hyper = Timetable(recipe, num_samples=_NUM_SAMPLES).hyper(self.method, 0)
        self.count, self.clip_norm, self.number = num_micro_batches, recipe.optim.clip_norm, 0
        self.trained = [p for p in self.method.parameters() if p.requires_grad]

    def step(self) -> None:
        """One of them."""
        method, optimizer, hyper = self.method, self.strategy.optimizer, self.hyper
        raw = [next(self.batches) for _ in range(self.count)]
        floats = functools.lru_cache(maxsize=1)(lambda i: method.augment(raw[i], seed=0, step=self.number))
        targets: list[Any] = [None] * self.count
        with self.strategy.autocast(), torch.no_grad():
            if method.observes(self.count):
                targets = method.combine([method.observe(floats(i), hyper) for i in range(self.count)], hyper)
        for i, target in enumerate(targets):
            with self.strategy.autocast():
                loss = method.learn(floats(i), target, hyper)["loss"] / self.count
            loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(hyper, torch._foreach_lerp_)
        self.number += 1


class _Turns(Watch):
    """Our loop's watch, which lets the bare loop have its turn when ours begins a step, and takes the times."""

    def __init__(
        self, bare: Bare, device: torch.device, *, steps: int, rounds: int, say: Callable[[str], None]
    ) -> None:
        super().__init__(timeout=3600.0)
        self.bare, self.device, self.steps, self.rounds, self.say = bare, device, steps, rounds, say
        self.blocks: dict[str, list[Block]] = {"ours": [], "bare": []}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.syncs: dict[str, int] = {}
        self.pauses: dict[str, list[float]] = {"ours": [], "bare": []}
        self.full = {"everything": _collect()}
        self._whose, self._phase, self._since = "ours", ("", 0.0), 0.0
        self._clock = (0.0, 0.0)
        self._profiling = contextlib.ExitStack()

    def beat(self, phase: str, *, step: int = 0) -> None:
        """See `Watch.beat`; "data" begins a step."""
        before, began = self._phase
        if self.blocks["bare"] and not self.syncs and before in _OUTSIDE:
            self.seconds[before].append(time.perf_counter() - began)
        if phase == "data":
            self._turn(step - 1 - _WARM_UP)
        elif phase == "end":
            self._profiling.close()
        super().beat(phase, step=step)
        self._phase = (phase, time.perf_counter())

    def _turn(self, done: int) -> None:
        """`done` steps of ours have been since the warm-up."""
        if done == 0:
            for _ in range(_WARM_UP):
                self.bare.step()
            self.full["what came since it was frozen"] = _collect()
            gc.callbacks.append(self._note)
        elif done > 0 and done % self.steps == 0 and len(self.blocks["ours"]) < self.rounds:
            self.blocks["ours"].append(self._stop(self.steps))
        if done >= 0 and done % self.steps == 0 and len(self.blocks["bare"]) < self.rounds:
            self.say(f"round {len(self.blocks['bare']) + 1} of {self.rounds}")
            self._start("bare")
            for _ in range(self.steps):
                self.bare.step()
            self.blocks["bare"].append(self._stop(self.steps))
            self._start("ours")
        if done == self.steps * self.rounds:
            gc.callbacks.remove(self._note)
            self._profile()

    def _profile(self) -> None:
        """Profile the steps that are left."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        profiler = profile(activities=activities, acc_events=True)
        self._profiling.callback(lambda: self.syncs.update(host_syncs(profiler.events() or ())))
        self._profiling.enter_context(profiler)
        self._profiling.enter_context(counted())

    def _start(self, whose: str) -> None:
        self._synchronize()
        self._whose, self._clock = whose, (time.process_time(), time.perf_counter())

    def _stop(self, count: int) -> Block:
        self._synchronize()
        cpu, wall = self._clock
        return Block(count, time.process_time() - cpu, time.perf_counter() - wall)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _note(self, when: str, info: dict[str, int]) -> None:
        if when == "start":
            self._since = time.perf_counter()
        else:
            self.pauses[self._whose].append(time.perf_counter() - self._since)

    def collection(self) -> dict[str, Any]:
        """Python's garbage collections: milliseconds of a full one over everything and over what came since it was
        frozen (`scaler.pauses`), and those that came by themselves in ours and in the bare loop's turns."""
        found: dict[str, Any] = {"full_ms": {name: 1000 * seconds for name, seconds in self.full.items()}}
        for whose, pauses in self.pauses.items():
            found[whose] = {
                "count": len(pauses),
                "total_ms": 1000 * sum(pauses),
                "longest_ms": 1000 * max(pauses, default=0.0),
            }
        return found


def prepared(recipe: Recipe, device: torch.device) -> tuple[Any, Strategy]:
    """The recipe's method on the device, and its strategy for one process."""
    method = build_method(recipe, world=World())
    strategy = DDP(
        resolve_strategy(recipe.strategy),
        world=World(),
        device=device,
        clip_norm=recipe.optim.clip_norm,
        deterministic=recipe.run.deterministic,
    )
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
    return method, strategy


def batches(method: Any, device: torch.device, num_micro_batches: int, micro_batch_size: int) -> Iterator[Batch]:
    """What a loader gives, over and over: the micro-batches of one step, pinned for a GPU."""
    made = []
    for number in range(num_micro_batches):
        batch = noise(
            method, micro_batch_size, world=World(), device=torch.device("cpu"), number=number, count=num_micro_batches
        )
        if device.type == "cuda":
            batch["views"] = {name: view.pin_memory() for name, view in batch["views"].items()}
        made.append({**batch, "seconds": {}})
    return itertools.cycle(made)


def time_row(recipe: Recipe, run_dir: Path, row: dict[str, Any]) -> float:
    """Milliseconds of handing a row to the log and its trackers, the median; the first ones are left out."""
    seconds = []
    with _log(recipe, run_dir, total_steps=_ROWS) as log:
        for step in range(1, _ROWS + 1):
            began = time.perf_counter()
            log.log({**row, "step": step})
            log.progress(step, row)
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[_ROWS // 10 :])


def _log(recipe: Recipe, run_dir: Path, *, total_steps: int, **options: Any) -> MetricsLog:
    return MetricsLog(
        run_dir,
        rank=0,
        start_step=0,
        total_steps=total_steps,
        track=recipe.track,
        recipe=recipe.model_dump(mode="json"),
        supply=Supply(num_workers=1, processes=1, remote=False, gpu=False),
        console=Console(file=io.StringIO()),
        **options,
    )


def _collect() -> float:
    began = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began


def as_table(result: dict[str, Any]) -> Table:
    """Both loops' steps, and what ours does outside of the computation."""
    table = Table(title=f"{result['recipe']} on {result['device']}, {result['threads']} threads")
    for column in ("", "ms"):
        table.add_column(column, justify="right" if column else "left")
    for kind, milliseconds in result["step_ms"].items():
        table.add_row({"ours": "step of our loop", "bare": "step of a bare loop"}[kind], f"{milliseconds:.2f}")
    for phase, milliseconds in result["outside_ms"].items():
        table.add_row(f"  {phase}, of each step of ours", f"{milliseconds:.3f}")
    for tracker, milliseconds in result["row_ms"].items():
        table.add_row(f"a row into the log, {tracker}", f"{milliseconds:.3f}")
    for what, milliseconds in result["collection"]["full_ms"].items():
        table.add_row(f"a full garbage collection of {what}", f"{milliseconds:.1f}")
    return table


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """What it means, in words."""
    overhead, outside = result["overhead"], sum(result["outside_ms"].values())
    rounds = ", ".join(f"{100 * value:+.1f}" for value in result["overhead_by_round"])
    yield (
        f"our loop takes {100 * overhead['wall']:+.2f} % of time ({100 * overhead['cpu']:+.2f} % of processor time) "
        f"against a bare one, the median of {result['rounds']} rounds: {rounds}"
    )
    waits = "" if result["device"] == "cpu" else ", in which logged steps wait for the GPU"
    share = 100 * outside / result["step_ms"]["ours"]
    yield f"outside of the computation {outside:.2f} ms{waits}, {share:.2f} % of a step"
    for whose in ("ours", "bare"):
        pauses = result["collection"][whose]
        yield (
            f"garbage collections in {result['rounds'] * result['steps']} steps, {whose}: {pauses['count']}, "
            f"{pauses['total_ms']:.1f} ms, the longest {pauses['longest_ms']:.1f} ms"
        )
    kind = torch.device("cpu" if result["device"] == "cpu" else "cuda")
    yield (
        f"in {result['profiled_steps']} steps, {result['logged_steps']} of them logged, "
        + as_line(result["host_syncs"], device=kind)
    )
