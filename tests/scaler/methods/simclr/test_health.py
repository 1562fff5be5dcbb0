"""The number of negatives is always said, and alarms tell collapse and guessing from learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaler.methods.simclr import health
from scaler.methods.simclr.method import SimCLR
from scaler.recipe import Optim
from tests.scaler.methods.simclr.batches import RESNET, VIT, make_batch, make_method


def row(method: SimCLR, *, step: int = 0) -> dict[str, float]:
    out = method("learn", method.augment(make_batch(range(12)), seed=1, step=step), None, {})
    out["loss"].backward()
    return {"step": 1000, **{name: float(value) for name, value in out["metrics"].items()}}


def test_a_collapsed_model_and_one_that_learns() -> None:
    method = make_method(**VIT)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    for step in range(15):
        optimizer.zero_grad()
        learning = row(method, step=step)
        optimizer.step()
    assert learning["negatives"] == 22 and not method.symptoms(learning)
    method = make_method(**VIT, head_batch_norm=False)
    with torch.no_grad():
        method.backbone.norm.weight.zero_()
        method.backbone.norm.bias.fill_(1.0)
    collapsed = row(method)
    assert set(method.symptoms(collapsed)) == {"collapsed_embeddings", "guessing"}
    assert not method.symptoms({**collapsed, "step": 100})


@pytest.mark.parametrize(
    ("size", "samples", "said"),
    [
        (4096, 1_000_000, []),
        (4096, None, []),
        (96, 1009, ["190 negatives make an easy task"]),
        (512, 300, ["512 images holds each of the 300 images more than once"]),
    ],
)
def test_advice(size: int, samples: int | None, said: list[str]) -> None:
    method = make_method(**RESNET)
    first, *more = method.advice(num_samples=samples, global_batch_size=size, steps={}.__getitem__, optim=Optim(lr=1.0))
    assert first.startswith(f"simclr: {2 * size - 2} negatives per anchor")
    assert len(more) == len(said)
    for line, text in zip(more, said, strict=True):
        assert line.startswith("warning: ") and text in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"jitter_probability": 0.0, "color_strength": 0.5, "hue": 0.1}, "method.color_strength and method.hue set"),
        ({"blur_probability": 0.0, "blur_kernel": 5}, "blur_kernel set, without effect: blur_probability is 0"),
        ({"blur_probability": 1.0, "blur_kernel": 0}, "blur_probability set, without effect: blur_kernel is 0"),
        ({"head_layers": 1, "head_hidden": 5}, "head_hidden set, without effect: the head has one layer"),
        ({"group_size": 8}, "group_size set, without effect: there is no drop path"),
    ],
)
def test_settings_that_nothing_reads_are_named(settings: dict[str, Any], said: str) -> None:
    _, line = health.advice(SimCLR.Settings(**settings), num_samples=None, global_batch_size=512)
    assert line.startswith("warning: ") and said in line
