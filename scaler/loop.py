"""The training loop, in time order. It knows the base classes of methods and strategies, and none by name."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scaler.beside import Beside
from scaler.checkpoint import Checkpointer
from scaler.collectives import Agreement, World
from scaler.late import Late
from scaler.layout import Layout
from scaler.machine import MachineMeter
from scaler.methods.base import Batch, Method
from scaler.metrics import MetricsLog
from scaler.optimizers import set_hyper
from scaler.pauses import short_pauses
from scaler.prefetch import on_device
from scaler.rejections import Rejections
from scaler.signals import StopSignals
from scaler.step import Metrics, training_step
from scaler.strategies import Strategy
from scaler.throughput import Throughput
from scaler.timetable import Timetable
from scaler.validation import Validation
from scaler.watch import Watch


@dataclass(frozen=True)
class Plan:
    """What a run does when, derived from its recipe."""

    timetable: Timetable
    layouts: Mapping[int, Layout]  # of each global batch size
    log_every: str
    save_every: str | None  # None: by the clock alone
    save_minutes: float  # 0: by steps alone
    seed: int
    max_nonfinite: int


@dataclass
class Progress:
    """Where the run is: updates made, and images seen, which alone decides the data that come next."""

    step: int = 0
    images: int = 0


def train(
    *,
    plan: Plan,
    progress: Progress,
    method: Method,
    strategy: Strategy,
    loader: Iterator[Batch],
    validation: Validation | None,
    checkpointer: Checkpointer,
    checkpoint_info: Callable[[], dict[str, Any]],
    rejections: Rejections,
    log: MetricsLog,
    machine: MachineMeter,
    signals: StopSignals,
    watch: Watch,
    world: World,
    device: torch.device,
) -> str:
    """Train from `progress` to the end of the plan, or to a signal; leaves a checkpoint behind in either case.

    Returns:
        Why it ended: "done", "stop_after", "signal", or "patience" (of the validation).

    Raises:
        NonFinite: too many non-finite steps in a row; the last checkpoint is whole by then.
        ValueError: too many rejected samples, a checkpoint that cannot be written.
    """
    batches, beside, meter = on_device(loader, device, say=log.note), Beside(device), Throughput()
    agreement, outcomes = Agreement(world, count=4), Late(device)
    began, stop, saved_at, last_save = progress.step, 0, progress.step, time.monotonic()
    nonfinite = hopeless = 0  # steps in a row that failed, and the last of them where they are too many
    timetable, exhausted = plan.timetable, validation is not None and validation.exhausted

    def save() -> None:
        nonlocal saved_at, last_save
        watch.beat("save", step=progress.step)
        rejections.exchange(log)
        log.sync()
        best = None if validation is None else validation.best_step
        checkpointer.save(step=progress.step, pieces=strategy.pieces(), info=checkpoint_info(), best=best)
        saved_at, last_save = progress.step, time.monotonic()

    def judge(known: list[tuple[int, bool]]) -> None:
        nonlocal nonfinite, hopeless
        for step, failed in known:
            nonfinite = nonfinite + 1 if failed else 0
            hopeless = hopeless or (step if nonfinite == plan.max_nonfinite else 0)
            if failed:
                log.note(
                    f"step {step}: the loss or gradient is not finite; the step was not taken "
                    f"(its samples: scaler batch RUN --step {step})"
                )

    with signals, short_pauses() as settle:
        while progress.step < timetable.stop and not exhausted:
            step = progress.step
            stage, hyper = timetable.stage(step), timetable.hyper(method, step)
            set_hyper(strategy.optimizer, hyper)

            # Data: this rank's micro-batches of the global batch.
            watch.beat("data", step=step + 1)
            with meter.waiting():
                raw = list(itertools.islice(batches, plan.layouts[stage.global_batch_size].num_micro_batches))
            rejections.add(step + 1, raw)
            for batch in raw:
                meter.add_stages(batch)

            # Augmentation, targets from the whole global batch, gradients, the update and what follows it.
            def at(phase: str, step: int = step) -> None:
                watch.beat(phase, step=step + 1)
                meter.at(phase, device)

            metrics, result = training_step(
                method, strategy, raw, hyper, seed=plan.seed, step=step, beside=beside, at=at
            )
            progress.step, progress.images = step + 1, progress.images + stage.global_batch_size
            meter.add(stage.global_batch_size)
            outcomes.put(progress.step, result.failed)
            judge(outcomes.known())

            if step == began:  # what was engaged, and its memory: gradients and activations are known by now
                log.describe(strategy.report(), memory=world.gather_objects(strategy.memory()))
                settle()

            # Held-out images; training goes on as if it had not been interrupted.
            scores: dict[str, float] = {}
            last = progress.step == timetable.total
            if validation is not None and (last or timetable.due(validation.every, progress.step)):
                with meter.paused():
                    scores = validation.run(progress.step, watch=watch)
                exhausted = validation.exhausted

            watch.beat("log", step=step + 1)
            if scores or last or timetable.due(plan.log_every, progress.step):
                row: dict[str, Any] = {"step": progress.step, "images": progress.images}
                if timetable.num_samples is not None:
                    row["epoch"] = progress.images / timetable.num_samples
                norms = {"grad_norm": result.grad_norm}
                if len(result.module_norms) > 1:
                    norms |= {f"grad_norm/{name}": norm for name, norm in result.module_norms.items()}
                norms |= strategy.loss_scale.report()
                means, known, pending = read_metrics(metrics, norms, rejections.pending, world)
                row |= {**means, **scores, **hyper, **known}
                row |= {**meter.read(), **machine.read(), "rejected": rejections.count + pending}
                log.log(row)
                log.progress(progress.step, row)
            else:
                log.progress(progress.step, {})

            # What all ranks do together, one step after the first of them wanted it.
            watch.beat("agree", step=step + 1)
            due = bool(plan.save_minutes) and time.monotonic() - last_save > 60 * plan.save_minutes
            flags = [signals.received, int(due), rejections.pending, hopeless]
            stop, clock_due, rejected, lost = agreement.exchange(flags)
            if rejected:
                rejections.exchange(log)
            if lost:
                agreement.last()
                checkpointer.wait()
                raise NonFinite(first=lost + 1 - plan.max_nonfinite, last=lost)
            if stop:
                break
            step_due = plan.save_every is not None and timetable.due(plan.save_every, progress.step)
            best_due = validation is not None and bool(scores) and validation.best_step == progress.step
            if clock_due or step_due or best_due:
                judge(outcomes.wait())
                if not nonfinite:  # a fault may have left its mark on buffers too
                    save()
            checkpointer.check()

        watch.beat("end", step=progress.step)
        agreement.last()
        judge(outcomes.wait())
        if hopeless:
            checkpointer.wait()
            raise NonFinite(first=hopeless + 1 - plan.max_nonfinite, last=hopeless)
        if saved_at != progress.step or progress.step == 0:
            save()
        checkpointer.wait()
    if progress.step >= timetable.total:
        return "done"
    return "signal" if stop else "patience" if exhausted else "stop_after"


class NonFinite(ValueError):
    """So many steps in a row had a loss or gradient that is not finite that the run must go back, or stop."""

    def __init__(self, *, first: int, last: int) -> None:
        super().__init__(
            f"steps {first} to {last} had non-finite losses or gradients and were not taken; see their samples with "
            f"`scaler batch RUN --step {first}`, and lower optim.lr, lengthen schedule.warmup, or use "
            "strategy.precision=fp32 or bf16"
        )


def read_metrics(
    metrics: list[Metrics], known: Metrics, count: int, world: World
) -> tuple[dict[str, float], dict[str, float], int]:
    """Means over micro-batches and ranks of what `learn` returned, the values that all ranks know already, and the sum
    of `count`; one collective, and the only time that a step waits for the device."""
    values = torch.stack([torch.stack([m[name].double() for name in metrics[0]]) for m in metrics]).mean(dim=0)
    totals = world.sum_(torch.cat([values, torch.full_like(values[:1], count)]))
    numbers = torch.cat([totals, torch.stack([value.double() for value in known.values()])]).tolist()
    means = {name: total / world.size for name, total in zip(metrics[0], numbers, strict=False)}
    return means, dict(zip(known, numbers[len(values) + 1 :], strict=True)), int(numbers[len(values)])
