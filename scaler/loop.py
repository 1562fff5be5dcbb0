"""The training loop, in time order. It knows the base classes of methods and strategies, and none by name."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scaler.checkpoint import Checkpointer
from scaler.collectives import Agreement, World
from scaler.layout import Layout
from scaler.machine import MachineMeter
from scaler.methods.base import Batch, Method
from scaler.metrics import MetricsLog
from scaler.optimizers import set_hyper
from scaler.prefetch import on_device
from scaler.rejections import Rejections
from scaler.signals import StopSignals
from scaler.strategies import Strategy
from scaler.throughput import Throughput
from scaler.timetable import Timetable
from scaler.validation import Validation
from scaler.watch import Watch
from shards.random import keyed_bits


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
    batches, meter, agreement = on_device(loader, device), Throughput(), Agreement(world, count=3)
    began, nonfinite, stop, saved_at, last_save = progress.step, 0, 0, progress.step, time.monotonic()
    timetable, exhausted = plan.timetable, validation is not None and validation.exhausted

    def save() -> None:
        nonlocal saved_at, last_save
        watch.beat("save", step=progress.step)
        rejections.exchange(log)
        log.sync()
        best = None if validation is None else validation.best_step
        checkpointer.save(step=progress.step, pieces=strategy.pieces(), info=checkpoint_info(), best=best)
        saved_at, last_save = progress.step, time.monotonic()

    with signals:
        while progress.step < timetable.stop and not exhausted:
            step = progress.step
            stage, hyper = timetable.stage(step), timetable.hyper(method, step)
            set_hyper(strategy.optimizer, hyper)

            # Data: this rank's micro-batches of the global batch, augmented on the device.
            watch.beat("data", step=step + 1)
            with meter.waiting():
                raw = list(itertools.islice(batches, plan.layouts[stage.global_batch_size].num_micro_batches))
            rejections.add(step + 1, raw)
            for batch in raw:
                meter.add_stages(batch)

            @functools.lru_cache(maxsize=1)  # one micro-batch of floats at a time; a single one is kept
            def prepare(i: int, raw: list[Batch] = raw, step: int = step) -> Batch:
                with meter.stage("augment", device):
                    return method.augment(raw[i], seed=plan.seed, step=step)

            # Targets that depend on the whole global batch.
            targets: list[Any] = [None] * len(raw)
            if method.observes(len(raw)):
                observations = []
                for i in range(len(raw)):
                    watch.beat("observe", step=step + 1)
                    reseed(plan.seed, step, world.rank, i)
                    observations.append(strategy("observe", prepare(i), hyper))
                watch.beat("combine", step=step + 1)
                targets = strategy("combine", observations, hyper)

            # Gradients, micro-batch by micro-batch.
            metrics = []
            for i, target in enumerate(targets):
                watch.beat("learn", step=step + 1)
                reseed(plan.seed, step, world.rank, i)
                with strategy.accumulate(last=i == len(raw) - 1):
                    out = strategy("learn", prepare(i), target, hyper)
                    watch.beat("backward", step=step + 1)
                    strategy.backward(nan_unless_finite(out["loss"]) / len(raw))
                metrics.append(out["metrics"])

            # The update, and what follows it (the teacher).
            watch.beat("update", step=step + 1)
            result = strategy.step()
            if result.taken:
                method.after_step(hyper, strategy.lerp_)
            progress.step, progress.images = step + 1, progress.images + stage.global_batch_size
            meter.add(stage.global_batch_size)

            if step == began:  # what was engaged, and its memory: gradients and activations are known by now
                log.describe(strategy.report(), memory=world.gather_objects(strategy.memory()))

            # A step that was not taken, for another reason than the fp16 scale that is still looking for its value.
            nonfinite = 0 if result.taken or not strategy.loss_scale.exhausted else nonfinite + 1
            if nonfinite:
                log.note(
                    f"step {step + 1}: the loss or gradient is not finite; the step was not taken "
                    f"(its samples: scaler batch RUN --step {step + 1})"
                )
            if nonfinite == plan.max_nonfinite:
                agreement.last()
                checkpointer.wait()
                raise NonFinite(first=step + 2 - nonfinite, last=step + 1)

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
                means, pending = reduce_metrics(metrics, rejections.pending, world)
                row |= {**means, **scores, **hyper, "grad_norm": result.grad_norm}
                if len(result.module_norms) > 1:
                    row |= {f"grad_norm/{name}": norm for name, norm in result.module_norms.items()}
                row |= strategy.loss_scale.report()
                row |= {**meter.read(), **machine.read(), "rejected": rejections.count + pending}
                log.log(row)
                log.progress(progress.step, row)
            else:
                log.progress(progress.step, {})

            # What all ranks do together, one step after the first of them wanted it.
            watch.beat("agree", step=step + 1)
            due = bool(plan.save_minutes) and time.monotonic() - last_save > 60 * plan.save_minutes
            stop, clock_due, rejected = agreement.exchange([signals.received, int(due), rejections.pending])
            if rejected:
                rejections.exchange(log)
            if stop:
                break
            step_due = plan.save_every is not None and timetable.due(plan.save_every, progress.step)
            best_due = validation is not None and bool(scores) and validation.best_step == progress.step
            if (clock_due or step_due or best_due) and not nonfinite:  # a fault may have left its mark on buffers too
                save()
            checkpointer.check()

        watch.beat("end", step=progress.step)
        agreement.last()
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


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with gradients that are not finite either where it is not, so that no rank takes the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def reseed(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Key torch's own generator (dropout in foreign models), the same for both passes over a micro-batch."""
    torch.manual_seed(int(keyed_bits("torch", seed, step, rank, micro_batch)))


def reduce_metrics(metrics: list[dict[str, torch.Tensor]], count: int, world: World) -> tuple[dict[str, float], int]:
    """Means over micro-batches and ranks of what `learn` returned, and the sum of `count`; one collective."""
    values = torch.stack([torch.stack([m[name].double() for name in metrics[0]]) for m in metrics]).mean(dim=0)
    totals = world.sum_(torch.cat([values, values.new_tensor([count])])).tolist()
    return dict(zip(metrics[0], (total / world.size for total in totals[:-1]), strict=True)), int(totals[-1])
