"""The step's phases in time order, what it keeps of a micro-batch, and what a step with a fault leaves behind."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from scaler.bench.stepper import noise
from scaler.beside import Beside
from scaler.collectives import World
from scaler.methods.base import Method
from scaler.optimizers import build_optimizer, set_hyper
from scaler.recipe import Recipe, load_recipe
from scaler.step import training_step
from scaler.strategies import Strategy, strategy_class
from scaler.timetable import Timetable
from scaler.train import build_method

CPU = torch.device("cpu")


def prepared(name: str) -> tuple[Recipe, Method, Strategy]:
    recipe = load_recipe(f"{name}/demo", overrides=["strategy.precision=fp32"], shards="none")
    method = build_method(recipe, world=World())
    settings = recipe.strategy.model_copy(update={"name": "ddp"})
    strategy = strategy_class("ddp")(
        settings, world=World(), device=CPU, clip_norm=recipe.optim.clip_norm, deterministic=False
    )
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
    return recipe, method, strategy


@pytest.mark.parametrize(
    ("name", "count", "phases"),
    [
        ("simclr", 1, "augment learn backward update average"),
        ("simclr", 2, 2 * "augment observe " + "combine " + 2 * "augment learn backward " + "update average"),
        ("dinov2", 1, "augment observe combine augment learn backward update average"),
    ],
)  # fmt: skip
def test_phases_come_in_order_and_one_augmented_micro_batch_is_alive(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, phases: str
) -> None:
    recipe, method, strategy = prepared(name)
    size = 8 if name == "simclr" else recipe.method.group_size
    raw = [noise(method, size, world=World(), device=CPU, number=i, count=count) for i in range(count)]
    hyper = Timetable(recipe, num_samples=1000).hyper(method, 0)
    set_hyper(strategy.optimizer, hyper)
    told: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    augment = type(method).augment

    def noted(self: Method, batch: dict[str, Any], **keys: int) -> dict[str, Any]:
        out = augment(self, batch, **keys)
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref(next(v for v in out.values() if torch.is_tensor(v) or v)[0]))
        return out

    monkeypatch.setattr(type(method), "augment", noted)
    metrics, result = training_step(method, strategy, raw, hyper, seed=0, step=0, beside=Beside(CPU), at=told.append)
    assert " ".join(told) == phases
    assert len(metrics) == count and bool(result.taken) and not bool(result.failed)
    assert float(result.grad_norm) > 0


def test_a_step_with_a_fault_changes_no_weight_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, method, strategy = prepared("dinov2")
    raw = [noise(method, recipe.method.group_size, world=World(), device=CPU)]
    hyper = Timetable(recipe, num_samples=1000).hyper(method, 0)
    set_hyper(strategy.optimizer, {**hyper, "lr": 1e-3, "last_layer_lr": 1e-3})
    learn = type(method).learn
    monkeypatch.setattr(type(method), "learn", lambda *a: {**(out := learn(*a)), "loss": out["loss"] * float("inf")})
    before = [p.detach().clone() for p in method.parameters()]
    _, result = training_step(method, strategy, raw, hyper, seed=0, step=0, beside=Beside(CPU))
    assert not bool(result.taken) and bool(result.failed) and not torch.isfinite(result.grad_norm)
    assert all(map(torch.equal, before, method.parameters()))
