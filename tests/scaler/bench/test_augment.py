"""`scaler bench augment`: every row really runs, and kornia's chain is what our settings say."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from scaler.bench import augment
from scaler.bench.augment import KORNIA, OURS, PIL, STEP, TORCH, V2, as_lines, as_table, kornia_chain, measure
from scaler.bench.contenders import Augmentation
from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.nn.color import Color
from scaler.recipe import load_recipe
from scaler.train import build_method
from tests.scaler.test_cli import scaler

M = 8
QUICK: dict[str, Any] = {"seconds": 0.001, "rounds": 2}


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}


def test_every_row_is_measured() -> None:
    threads, said = torch.get_num_threads(), list[str]()
    result = measure("dinov2/demo", images=M, step=True, say=said.append, **QUICK)
    assert torch.get_num_threads() == threads and said[-1] == "round 2 of 2"
    rows = rows_of(result)
    kernels = {TORCH} if torch.cuda.is_available() else set()
    assert rows.keys() == {OURS, PIL, V2, STEP, KORNIA} | kernels
    if augment.why_no_kornia() is not None:
        assert rows.pop(KORNIA) == {"name": KORNIA, "missing": "not installed"}
    for name, row in rows.items():
        assert len(row["blocks"]) == 2 and row["images_per_second"] > 0 < row["images_per_cpu_second"]
        assert row["views_per_second"] == pytest.approx(4 * row["images_per_second"])
        assert ("ours_times_as_fast" in row) == (name not in (OURS, STEP))
    mine, step = rows[OURS], rows[STEP]
    assert mine["batch_seconds"] < rows[PIL]["batch_seconds"], "by batch, not image by image"
    share = rows[OURS]["share_of_step"]
    assert 0 < share < 1 and share == pytest.approx(mine["batch_seconds"] / step["batch_seconds"], rel=0.7)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(as_table(result))
    text = "\n".join([console.export_text(), *as_lines(result)])
    assert "2 of 16 px" in text and "% of the step" in text and f"ours, against {PIL}: " in text


@pytest.mark.parametrize("name", ["dinov2/demo", "simclr/demo", "supervised/demo"])
def test_ours_without_kernels_has_the_colours_of_the_method(name: str) -> None:
    recipe = load_recipe(name, overrides=[f"data.global_batch_size={M}"], shards="none")
    method: Any = build_method(recipe, world=World())
    batch = noise(method, M, world=World(), device=torch.device("cpu"))
    augmentation = Augmentation.of(recipe.method, image_size=recipe.data.image_size)
    made = method.augment(batch, seed=0, step=0)
    parts = sorted(made["crops"] if "crops" in made else [made["images"]], key=len_of_side)
    for mine, theirs in zip(augment._ours_by_torch(batch, augmentation, method.views, method), parts, strict=True):
        torch.testing.assert_close(mine, theirs)


def len_of_side(images: Tensor) -> int:
    return images.shape[-1]


def test_kornia_is_asked_for_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no dependency: what would be built is written down."""

    class Written(torch.nn.Identity):
        def __init__(self, *values: Any, **named: Any) -> None:
            super().__init__()
            self.values, self.named = values, named

    names = ["ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize", "Normalize"]
    kinds = {name: type(name, (Written,), {}) for name in [*names, "AugmentationSequential"]}
    monkeypatch.setitem(sys.modules, "kornia", types.ModuleType("kornia"))
    monkeypatch.setitem(sys.modules, "kornia.augmentation", types.SimpleNamespace(**kinds))
    full = Color(
        brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, blur_kernel=9,
        solarize_p=0.3, solarize_threshold=127.5,
    )  # fmt: skip
    normalization = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    steps = {type(step).__name__: step for step in kornia_chain(full, normalization).values}
    assert list(steps) == names
    jitter = steps["ColorJitter"]
    assert jitter.values == (pytest.approx((0.6, 1.4)), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))
    assert steps["RandomGaussianBlur"].values == ((9, 9), (0.1, 2.0))
    assert steps["RandomSolarize"].values == ((0.5, 0.5), (0.0, 0.0))
    assert [steps[name].named["p"] for name in names[:-1]] == [0.8, 0.2, 0.5, 0.3]
    (alone,) = kornia_chain(Color(jitter_p=1.0), normalization).values
    assert type(alone).__name__ == "Normalize"


@pytest.mark.skipif(augment.why_no_kornia() is not None, reason="kornia is not installed")
def test_kornia_computes_what_we_compute() -> None:
    from scaler.bench.augment import color

    x = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalization = ((0.0,) * 3, (1.0,) * 3)
    for settings in (
        Color(solarize_p=1),
        Color(grayscale_p=1),
        Color(brightness=0.8, jitter_p=1),
        Color(hue=0.2, jitter_p=1),
    ):
        p = color.sample_color(
            settings, seed=0, epochs=torch.zeros(400).long(), ids=torch.arange(400), view="v", copy=0
        )
        ours = color.apply_color_with_torch(x, p, mean=(0.0,) * 3, std=(1.0,) * 3)
        theirs = kornia_chain(settings, normalization)(x / 255)
        moved = [(images - x / 255).abs().mean((1, 2, 3)) for images in (ours, theirs)]
        assert float(moved[0].mean()) == pytest.approx(float(moved[1].mean()), rel=0.1)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "made" / "result.json"
    words = ["--images", "8", "--seconds", "0.001", "--rounds", "1", "--peers", "none", "--out", str(out)]
    done = scaler("bench", "augment", "simclr/demo", *words)
    assert done.returncode == 0 and "images / CPU-s" in done.stdout, done.stderr
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]][:1] == [OURS] and {"date", "cpu", "packages"} <= result.keys()
    with pytest.raises(ValueError, match="no peer 'opencv'; there are kornia, torchvision"):
        measure("simclr/demo", peers=["opencv"])
