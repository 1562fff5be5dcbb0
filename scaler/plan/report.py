"""A plan for people and for scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from scaler.plan.memory import PARTS
from scaler.plan.planner import USABLE, Choice, Machine, Plan

_GB = 1e9
_WIDTH = 136  # columns that the tables need


def _number(value: float) -> str:
    """Three digits, or nothing for nothing."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value else ""


def show_plan(plan: Plan, machine: Machine, *, start: Callable[[Choice], str]) -> None:
    """Print what was found on standard output; `start` is the command for a choice."""
    console = Console(width=max(_WIDTH, Console().width))
    console.print(
        f"{plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M of them trained; {plan.steps:,} steps "
        f"of {plan.global_batch_size:,} images, {plan.images:,} in all, on {machine.ranks} GPUs of "
        f"{machine.memory / _GB:g} GB, {machine.gpus} in a machine",
        highlight=False,
    )
    table = Table(title="The largest micro-batches that fit", box=SIMPLE)
    parts = Table(title="GB on a GPU at the fullest moment of a step", box=SIMPLE)
    for part in (table, parts):
        part.add_column("strategy, precision, checkpointing" if part is table else "", no_wrap=True)
    for name in ("images x times", "GB of a GPU", "GB sent", "network s", "compute s", "images/s", "days"):
        table.add_column(name, justify="right")
    for name in (*PARTS, "in"):
        parts.add_column(name, justify="right")
    for choice in plan.choices:
        layout, memory = choice.layout, choice.step.memory
        style = "bold" if choice is plan.best else None if choice.fits else "dim"
        name = f"{choice.strategy}, {choice.precision}, {choice.checkpointing}"
        table.add_row(
            name,
            f"{layout.micro_batch_size} x {layout.num_micro_batches}",
            _number(memory.peak / _GB) + ("" if choice.fits else " too much"),
            _number(choice.step.sent / _GB),
            _number(choice.network),
            _number(choice.compute),
            f"{choice.images_per_second:,.0f}" if choice.fits else "",
            _number(plan.days(choice)) if choice.fits else "",
            style=style,
        )
        parts.add_row(name, *(_number(memory.parts[part] / _GB) for part in PARTS), memory.when, style=style)
    console.print(table)
    console.print(parts)
    for line in _advice(plan, machine):
        console.print(line, highlight=False)
    if plan.best is not None:
        console.print("\nTo start it:", highlight=False)
        print(start(plan.best), end="")
    console.print("\nThis rests on:")
    for line in plan.assumptions:
        console.print(f"* {line}", highlight=False)


def plan_as_json(plan: Plan, machine: Machine, *, start: Callable[[Choice], str]) -> dict[str, Any]:
    """The same as plain data; bytes and seconds."""
    return {
        "parameters": plan.parameters,
        "trained": plan.trained,
        "steps": plan.steps,
        "images": plan.images,
        "global_batch_size": plan.global_batch_size,
        "gpus": machine.ranks,
        "choices": [_as_json(plan, choice) for choice in plan.choices],
        "best": None if plan.best is None else {**_as_json(plan, plan.best), "command": start(plan.best)},
        "assumptions": plan.assumptions,
    }


def measured_as_rows(found: dict[str, Any]) -> dict[str, str]:
    """What `scaler.plan.measure.compare_here` found, for people."""
    planned, measured = found["planned"], found["measured"]

    def pair(a: int, b: int) -> str:
        return f"{a / 1e6:,.1f} MB, {b / 1e6:,.1f} MB"

    said = {
        part: pair(planned["parts"][part], measured["parts"][part]) for part in ("parameters", "optimizer", "teacher")
    }
    return {
        "measured": f"{found['method']} {found['backbone']}, {found['strategy']}, {found['precision']}, checkpointing "
        f"{found['activation_checkpointing']}, {found['ranks']} ranks on {found['device']}, "
        f"{found['num_micro_batches']} x {found['micro_batch_size']} images",
        **{f"{part}: planned, measured": text for part, text in said.items()},
        "at most: planned, measured": pair(planned["peak"], measured["peak"]),
        "reached in: planned, measured": f"{planned['when']}, {measured['when']}",
        "difference": f"{100 * found['difference']:+.1f} %",
        "sent a step: planned, measured": pair(planned["sent"], measured["sent"]),
    }


def _advice(plan: Plan, machine: Machine) -> list[str]:
    best = plan.best
    if best is None:
        least = min(plan.choices, key=lambda choice: choice.step.memory.peak)
        return [
            f"\nNothing fits: the least is {_number(least.step.memory.peak / _GB)} GB on a GPU ({least.strategy}, "
            f"checkpointing {least.checkpointing}, micro-batch {least.layout.micro_batch_size}), and "
            f"{_number(USABLE * machine.memory / _GB)} GB are usable; "
            "take more or larger GPUs, bf16, strategy.cpu_offload, or smaller images or models"
        ]
    layout, rate = best.layout, best.images_per_second
    lines = [
        f"\nRecommended: {best.strategy} in {best.precision}, activation checkpointing {best.checkpointing}, "
        f"{layout.num_micro_batches} x {layout.micro_batch_size} images on each of {layout.ranks} GPUs: "
        f"{_number(best.step.memory.peak / _GB)} GB, {_number(best.seconds)} s a step, {_number(plan.days(best))} days",
        f"The loaders must deliver {rate:,.0f} images/s, {rate / layout.ranks:,.0f} for each GPU"
        + (
            "; --loader with what `scaler bench loader` says of a worker here gives their number"
            if (workers := plan.workers(best)) is None
            else f": data.num_workers={workers}"
        ),
    ]
    return lines


def _as_json(plan: Plan, choice: Choice) -> dict[str, Any]:
    return {
        "strategy": choice.strategy,
        "precision": choice.precision,
        "activation_checkpointing": choice.checkpointing,
        "fits": choice.fits,
        "micro_batch_size": choice.layout.micro_batch_size,
        "num_micro_batches": choice.layout.num_micro_batches,
        "memory": choice.step.memory.peak,
        "fullest_in": choice.step.memory.when,
        "parts": choice.step.memory.parts,
        "sent": choice.step.sent,
        "flops": choice.step.flops,
        "network_seconds": choice.network,
        "compute_seconds": choice.compute,
        "images_per_second": choice.images_per_second,
        "workers_per_gpu": plan.workers(choice),
        "days": plan.days(choice),
    }
