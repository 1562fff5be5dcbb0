"""The training loop, in time order. It knows the base classes of methods and strategies, and none by name."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scaler.checkpoint import Checkpointer
from scaler.collectives import Agreement, World
from scaler.methods.base import Batch, Hyper, Method
from scaler.metrics import MetricsLog, memory_gib
from scaler.optimizers import set_hyper
from scaler.prefetch import on_device
from scaler.rejections import Rejections
from scaler.signals import StopSignals
from scaler.strategies import Strategy
from scaler.throughput import Throughput
from scaler.watch import Watch
from shards.random import keyed_bits


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that are derived from its recipe, in steps and images."""

    total_steps: int
    stop_step: int
    global_batch_size: int
    num_micro_batches: int
    num_samples: int | None  # None: of a stream nobody knows
    log_every: int
    save_every: int  # steps; 0: by the clock alone
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
    hyper_at: Callable[[int], Hyper],
    checkpointer: Checkpointer,
    checkpoint_info: Callable[[], dict[str, Any]],
    rejections: Rejections,
    log: MetricsLog,
    signals: StopSignals,
    watch: Watch,
    world: World,
    device: torch.device,
) -> str:
    """Train from `progress` to the end of the plan, or to a signal; leaves a checkpoint behind in either case.

    Returns:
        Why it ended: "done", "stop_after" or "signal".

    Raises:
        NonFinite: too many non-finite steps in a row; the last checkpoint is whole by then.
        ValueError: too many rejected samples, a checkpoint that cannot be written.
    """
    batches, meter, agreement = on_device(loader, device), Throughput(), Agreement(world, count=3)
    began, nonfinite, stop, saved_at, last_save = progress.step, 0, 0, progress.step, time.monotonic()

    def save() -> None:
        nonlocal saved_at, last_save
        watch.beat("save", step=progress.step)
        rejections.exchange(log)
        log.sync()
        checkpointer.save(step=progress.step, pieces=strategy.pieces(), info=checkpoint_info())
        saved_at, last_save = progress.step, time.monotonic()

    with signals:
        while progress.step < plan.stop_step:
            step = progress.step
            hyper = hyper_at(step)
            set_hyper(strategy.optimizer, hyper)

            # Data: this rank's micro-batches of the global batch, augmented on the device.
            watch.beat("data", step=step + 1)
            with meter.waiting():
                raw = list(itertools.islice(batches, plan.num_micro_batches))
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
            progress.step, progress.images = step + 1, progress.images + plan.global_batch_size
            meter.add(plan.global_batch_size)

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

            watch.beat("log", step=step + 1)
            if progress.step % plan.log_every == 0 or progress.step == plan.total_steps:
                row: dict[str, Any] = {"step": progress.step, "images": progress.images}
                if plan.num_samples is not None:
                    row["epoch"] = progress.images / plan.num_samples
                means, pending = reduce_metrics(metrics, rejections.pending, world)
                row |= means
                row |= {**hyper, "grad_norm": result.grad_norm, **strategy.loss_scale.report()}
                row |= {**meter.read(), "memory_gib": memory_gib(device), "rejected": rejections.count + pending}
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
            step_due = bool(plan.save_every) and progress.step % plan.save_every == 0
            if (clock_due or step_due) and not nonfinite:  # a fault may have left its mark on buffers too
                save()
            checkpointer.check()

        watch.beat("end", step=progress.step)
        agreement.last()
        if saved_at != progress.step or progress.step == 0:
            save()
        checkpointer.wait()
    return "done" if progress.step >= plan.total_steps else "signal" if stop else "stop_after"


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
