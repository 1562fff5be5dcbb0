"""One training step, in time order: as the loop takes it, and as benchmarks and plans measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaler.beside import Beside
from scaler.methods.base import Batch, Hyper, Method
from scaler.strategies import StepResult, Strategy
from shards.random import keyed_bits

Metrics = dict[str, Tensor]


def training_step(
    method: Method,
    strategy: Strategy,
    raw: Sequence[Batch],
    hyper: Hyper,
    *,
    seed: int,
    step: int,
    beside: Beside,
    at: Callable[[str], None] = lambda phase: None,
) -> tuple[list[Metrics], StepResult]:
    """Learn from one global batch: this rank's micro-batches of it, in their order, and one update.

    Nothing in it waits for the device (DeepSpeed's own steps excepted), so that a GPU always has work queued.

    Args:
        method: that the strategy has prepared.
        raw: the micro-batches as the loader gives them, on the training device.
        hyper: the scheduled values of this step; the optimiser has its own of them (`set_hyper`).
        seed, step: key every random draw.
        beside: makes augmented micro-batches, one ahead of use on a GPU; a single one is kept.
        at: is told what begins: augment, observe, combine, learn, backward, update, average; some come several times.
            What a GPU does between augment and the next is to wait for the augmentation.

    Returns:
        What `learn` measured of every micro-batch, detached scalars on the device, and the update's outcome.
    """

    def augment(batch: Batch) -> Batch:
        return method.augment(batch, seed=seed, step=step)

    order, observes = list(range(len(raw))), method.observes(len(raw))
    batches = beside.each(augment, raw, order=order * 2 if observes else order)

    def key_torch(i: int) -> None:
        """Key torch's own generator (dropout in foreign models), the same for both passes over a micro-batch."""
        bits = int(keyed_bits("torch", seed, step, strategy.world.rank, i))
        torch.default_generator.manual_seed(bits)  # not torch.manual_seed, which looks at every kind of device
        if strategy.device.type == "cuda":
            torch.cuda.manual_seed(bits)

    # Targets that depend on the whole global batch.
    targets: list[Any] = [None] * len(raw)
    if observes:
        observations = []
        for i in order:
            at("augment")
            batch = next(batches)
            at("observe")
            key_torch(i)
            observations.append(strategy("observe", batch, hyper))
        at("combine")
        targets = strategy("combine", observations, hyper)
        del observations

    # Gradients, micro-batch by micro-batch; each one's target is let go of after it.
    metrics = []
    for i in order:
        at("augment")
        batch = next(batches)
        at("learn")
        key_torch(i)
        with strategy.accumulate(last=i == len(raw) - 1):
            out = strategy("learn", batch, targets[i], hyper)
            metrics.append(out["metrics"])
            loss, targets[i] = nan_unless_finite(out.pop("loss")) / len(raw), None
            del batch
            at("backward")
            strategy.backward(loss)
            del loss
    batches.close()  # and with it the last batch

    # The update, and what follows it (the teacher).
    at("update")
    result = strategy.step()
    at("average")
    method.after_step(hyper, strategy.lerp_)
    return metrics, result


def nan_unless_finite(loss: Tensor) -> Tensor:
    """The loss, with gradients that are not finite either where it is not, so that no rank takes the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
