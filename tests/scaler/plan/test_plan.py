"""The plan against real processes, and its arithmetic."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout, suppress
from typing import Any

import pytest
import typer

from scaler.cli import app
from scaler.collectives import World
from scaler.layout import Layout
from scaler.plan.memory import PARTS, Setup
from scaler.plan.model import Model
from scaler.plan.planner import Machine, plan_recipe, possible_layouts, predict
from scaler.plan.trace import meta_method, trace_step
from scaler.plan.traffic import Traffic, traffic_of
from scaler.recipe import load_recipe
from scaler.strategies import STRATEGIES
from scaler.strategies.launcher import resolve_strategy
from tests.long import LONG, only_long
from tests.scaler.plan.matrix import CASES, FP32, compare

SMALL = {
    "dinov2": ("dinov2/demo", Layout(2, 8, 2), (FP32, "method.embed_dim=128", "method.num_prototypes=2000")),
    "simclr": ("simclr/demo", Layout(2, 8, 1), (FP32, "method.embed_dim=128")),
}


@pytest.mark.parametrize("name", ["dinov2", pytest.param("simclr", marks=only_long)])
def test_memory_and_traffic_are_those_of_real_processes(name: str) -> None:
    """Strategies on two ranks: the fullest moment of live tensors, what is held, and what was sent."""
    chosen = tuple(STRATEGIES) if LONG else ("ddp", "fsdp2", "zero3")
    for strategy, (planned, real) in compare(*SMALL[name], chosen).items():
        assert planned.memory.peak == pytest.approx(real["peak"], rel=0.1), strategy
        assert planned.sent == pytest.approx(real["sent"], rel=0.12), strategy
        for part in ("parameters", "optimizer", "teacher"):
            assert planned.memory.parts[part] == pytest.approx(real["parts"][part], rel=0.1, abs=20_000), part
        assert sum(planned.memory.parts.values()) == planned.memory.peak and tuple(planned.memory.parts) == PARTS


@only_long
@pytest.mark.parametrize("case", list(CASES))
def test_memory_of_whole_models(case: str) -> None:
    for strategies in (("ddp", "fsdp2"), ("zero1",), ("zero2",), ("zero3",)):
        for strategy, (planned, real) in compare(*CASES[case], strategies).items():
            assert planned.memory.peak == pytest.approx(real["peak"], rel=0.1), strategy


def settings_of(*overrides: str) -> tuple:
    recipe = load_recipe("dinov2/demo", overrides=["data.global_batch_size=64", *overrides])
    return recipe, resolve_strategy(recipe.strategy)


def test_a_trace_is_exact_and_linear_in_the_images() -> None:
    recipe, settings = settings_of("method.depth=1")
    common: Any = {"ranks": 1, "gathered": False}
    traces = {
        m: trace_step(recipe, settings, micro_batch_size=m, num_micro_batches=64 // m, **common) for m in (8, 16, 32)
    }
    between = traces[8].towards(traces[32], 16)
    for name in ("forward", "activations", "inputs", "views", "flops"):
        assert getattr(between, name) == pytest.approx(getattr(traces[16], name), rel=0.01), name
    assert len(between.backward) == len(traces[16].backward) == len({s.parameter for s in between.backward})
    checkpointed = {}
    for wanted in ("selective", "blocks"):
        saved = settings.model_copy(update={"activation_checkpointing": wanted})
        checkpointed[wanted] = trace_step(recipe, saved, micro_batch_size=32, num_micro_batches=2, **common)
    blocks, selective = checkpointed["blocks"], checkpointed["selective"]
    assert blocks.activations < selective.activations < traces[32].activations
    assert blocks.flops > selective.flops == traces[32].flops, "what is dear is kept"


def test_rings_send_what_the_formulas_say() -> None:
    """Patarasuk & Yuan 2009; ZeRO's own account (arXiv 1910.02054): 2 parameters' worth for DDP, 3 for stage 3."""
    recipe, settings = settings_of("strategy.precision=fp32")
    model = Model.of(meta_method(recipe, world=World()), recipe)
    trained = model.count(model.trained)
    trace = trace_step(recipe, settings, micro_batch_size=8, num_micro_batches=1, ranks=8, gathered=False)
    named = {name: settings.model_copy(update={"name": name}) for name in STRATEGIES}
    sent = {name: traffic_of(name, model, trace, Setup(named[name], 8, 8, 1)) for name in STRATEGIES}
    assert sent["ddp"].sent == 2 * 4 * trained * 7 // 8
    assert sent["zero2"].sent == 3 * 4 * trained * 7 // 8
    assert sent["zero3"].sent > sent["fsdp2"].sent > sent["ddp"].sent
    hybrid = traffic_of("fsdp2", model, trace, Setup(named["fsdp2"], 8, 4, 1))
    assert hybrid.across == 2 * 4 * -(-trained // 4) // 2 and hybrid.everywhere == 0 < hybrid.inside
    far: Any = {"nodes": 2, "gpus": 4, "intra": 100.0, "inter": 10.0}
    assert Traffic(everywhere=1000).seconds(**far | {"nodes": 1}) == 10
    assert Traffic(everywhere=1000).seconds(**far) == 25, "four links leave a machine"
    assert Traffic(inside=1000, across=100).seconds(**far) == 20


def test_the_largest_micro_batch_that_fits() -> None:
    words = ["data.global_batch_size=16", "strategy.precision=bf16", "method.depth=1"]
    recipe = load_recipe("simclr/demo", overrides=words)
    settings = resolve_strategy(recipe.strategy).model_copy(update={"name": "ddp"})
    layouts = [Layout(4, 1, 4), Layout(4, 2, 2), Layout(4, 4, 1)]
    peaks = {layout: predict(recipe, settings, layout).memory.peak for layout in layouts}
    _, middle, most = sorted(peaks.values())
    tight = Machine(gpus=2, nodes=2, memory=(middle + most) / 2 / 0.92, images_per_second=100.0, loader=40.0)
    plan = plan_recipe(recipe, tight, images=6400)
    assert [c.strategy for c in plan.choices[:6]] == ["ddp", "zero1", "zero2", "fsdp2", "fsdp2 by node", "zero3"]
    ddp = plan.choices[0]
    assert ddp.fits and ddp.layout == [layout for layout in layouts if peaks[layout] < most][-1]
    assert ddp.step.memory.peak == pytest.approx(peaks[ddp.layout], rel=0.01)
    assert all(c.fits == (c.step.memory.peak <= 0.92 * tight.memory) for c in plan.choices)
    assert plan.best is not None and plan.best.strategy == "ddp", "of equally fast ones the simplest"
    assert f"strategy.micro_batch_size={plan.best.layout.micro_batch_size}" in plan.best.overrides(recipe)
    assert plan.days(ddp) == pytest.approx(plan.images / 400 / 86400) and plan.workers(ddp) == 3


def test_layouts_that_cannot_be() -> None:
    recipe, _ = settings_of()
    method = meta_method(recipe, world=World())
    assert [layout.micro_batch_size for layout in possible_layouts(method, 64, ranks=2)] == [8, 16, 32]
    with pytest.raises(ValueError, match=r"64 images over 16 GPUs are 4 each: .*whole groups of method\.group_size 8"):
        possible_layouts(method, 64, ranks=16)
    with pytest.raises(ValueError, match="nearest valid choices: a global batch of 63 or 66"):
        possible_layouts(method, 64, ranks=3)


def test_the_command_answers_scripts_and_people() -> None:
    words = [
        "plan",
        "simclr/demo",
        "--gpus",
        "1",
        "data.global_batch_size=2",
        "method.depth=1",
        "strategy.precision=bf16",
    ]
    found = json.loads(said(*words, "--json", "--memory", "1GB"))
    assert found["best"]["strategy"] == "ddp" and "-m scaler.train simclr/demo" in found["best"]["command"]
    assert all(sum(c["parts"].values()) == c["memory"] for c in found["choices"])
    text = said(*words, "--memory", "1MB")
    assert "Nothing fits: the least is" in text and "ImageNet-1k" in text and "too much" in text


def said(*words: str) -> str:
    text = io.StringIO()
    with redirect_stdout(text), suppress(typer.Exit):
        app(list(words), standalone_mode=False)
    return text.getvalue()
