"""What a batch gets on the device is what torchvision gives each image by itself, within one grey level.

By torch's operations and by Triton's kernels (interpreted where there is no GPU), for every operation and for the
whole chains of the methods, from the parameters that were drawn, after taking the normalisation off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as V
from torch import Tensor

from scaler.bench.contenders import Augmentation
from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.nn import color
from scaler.nn.color import Color, ColorParameters, apply_color, sample_color
from scaler.nn.kernels import has_triton
from scaler.recipe import load_recipe
from scaler.train import build_method
from tests.images import make_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVEL = 1.001  # grey levels: where solarise jumps, from 128 to 127, a rounding error may be on the other side
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = Callable[[Tensor], Tensor]


@pytest.fixture(params=["torch", "kernels"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way colours go."""
    if request.param == "kernels" and not has_triton():
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(color, "runs_kernels", lambda x: request.param == "kernels")
    return request.param


def photos(m: int, size: int) -> Tensor:
    """Uint8 [m, 3, size, size]."""
    return torch.stack([torch.from_numpy(make_pixels(size, size, seed=i)).permute(2, 0, 1) for i in range(m)])


def levels(normalized: Tensor, normalization: tuple[Sequence[float], Sequence[float]] = (MEAN, STD)) -> Tensor:
    """Grey levels from 0 to 255, float64, of normalised images [m, 3, h, w]."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in normalization)
    return (normalized.cpu().double() * std + mean) * 255


def steps(p: ColorParameters, i: int, *, of: float) -> Iterator[Step]:
    """torchvision's functions for row i; `of` is the largest pixel, 255 of bytes and 1 of floats."""
    factors = [float(value) for value in p.factors[i]]
    jitter = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    if p.jitter[i]:
        for operation in p.order[i]:
            yield lambda x, k=operation: jitter[k](x, factors[k])
    if p.grayscale[i]:
        yield lambda x: V.rgb_to_grayscale(x, num_output_channels=3)
    if p.sigma[i] > 0:
        yield lambda x: V.gaussian_blur(x, [p.blur_kernel] * 2, [float(p.sigma[i])] * 2)
    if p.solarize[i]:
        yield lambda x: V.solarize(x, p.solarize_threshold * of / 255)


def alone(image: Tensor, p: ColorParameters, i: int) -> Tensor:
    """One image through torchvision, as bytes if it is one of bytes; grey levels from 0 to 255."""
    of = 1.0 if image.is_floating_point() else 255.0
    for step in steps(p, i, of=of):
        image = step(image)
    return image.double() * 255 / of


OPERATIONS = {
    "normalise": Color(),
    "brightness": Color(brightness=0.8, jitter_p=1),
    "contrast": Color(contrast=0.8, jitter_p=1),
    "saturation": Color(saturation=0.8, jitter_p=1),
    "hue": Color(hue=0.5, jitter_p=1),
    "grayscale": Color(grayscale_p=1),
    "blur": Color(blur_p=1, blur_kernel=5, blur_sigma=(0.5, 2.0)),
    "solarise": Color(solarize_p=1),
}


# Of bytes torchvision cuts grey to a whole level before it mixes it in, and the mixture once more: two levels together.
CUT_TWICE = ("contrast", "saturation")


@pytest.mark.parametrize(
    ("name", "as_float"),
    [(name, kind) for name in OPERATIONS for kind in (False, True) if kind or name not in CUT_TWICE],
)
def test_every_operation(name: str, as_float: bool, by: str) -> None:
    x = photos(6, 28)
    p = sample_color(OPERATIONS[name], seed=1, epochs=torch.zeros(6).long(), ids=torch.arange(6), view="v", copy=0)
    found = levels(apply_color(x.to(DEVICE), p, mean=MEAN, std=STD))
    given = x / 255 if as_float else x
    for i, image in enumerate(given):
        assert (len(list(steps(p, i, of=1.0))) > 0) == (name != "normalise")
        difference = (found[i] - alone(image, p, i)).abs().max()
        assert difference <= (1e-3 if as_float and name != "solarise" else LEVEL), (name, i)
        if name != "normalise":
            assert (found[i] - x[i]).abs().max() > 3, "something has happened"


@dataclass(frozen=True)
class Chain:
    """A recipe whose colours are all at work, and where its augmentation puts the views."""

    recipe: str
    overrides: Sequence[str]
    operations: int  # that some image gets

    def views(self, made: dict[str, Any]) -> list[Tensor]:
        """[m, 3, h, w] each, in the order of the loader's views and their copies."""
        parts = made["crops"] if "crops" in made else [made["images"]]
        return [view for part in parts for view in part.split(M)]


M = 8
CHAINS = {
    "simclr": Chain("simclr/resnet50_in1k", ["data.image_size=40"], 6),
    "dinov2": Chain(
        "dinov2/vits16_in1k",
        ["data.image_size=32", "method.local_size=16", "method.num_local_crops=3", f"method.group_size={M}",
         "method.solarize_probability=0.5"],
        7,
    ),
    "supervised": Chain(
        "supervised/resnet50_in1k",
        ["method.color_jitter=0.4", "method.hue=0.1", "method.grayscale_probability=0.4", "method.mixup=0",
         "method.cutmix=0", "data.image_size=40"],
        5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_whole_chains(name: str, by: str) -> None:
    chain = CHAINS[name]
    recipe = load_recipe(chain.recipe, overrides=[f"data.global_batch_size={M}", *chain.overrides], shards="none")
    with torch.device("meta"):
        method: Any = build_method(recipe, world=World())
    batch = noise(method, M, world=World(), device=torch.device("cpu"))
    for view in method.views:
        batch["views"][view.name] = photos(view.count * M, view.size).view(view.count, M, 3, view.size, view.size)
    batch["ids"], batch["epochs"] = 37 * torch.arange(M) + 5, torch.arange(M) % 3
    on_device = {**batch, "views": {name: view.to(DEVICE) for name, view in batch["views"].items()}}
    found = chain.views(method.augment(on_device, seed=11, step=2))
    colors = Augmentation.of(recipe.method, image_size=recipe.data.image_size).colors
    keys: dict[str, Any] = {"seed": 11, "epochs": batch["epochs"], "ids": batch["ids"]}
    worst, operations = 0.0, set()
    places = [(view, copy) for view in method.views for copy in range(view.count)]
    assert len(found) == len(places)
    for (view, copy), images in zip(places, found, strict=True):
        p = sample_color(colors[view.name], **keys, view=view.name, copy=copy)
        for i in range(M):
            expected = alone(batch["views"][view.name][copy, i] / 255, p, i)
            worst = max(worst, float((levels(images[i], method.normalization) - expected).abs().max()))
            operations |= {f"jitter {k}" for k in range(4) if p.jitter[i] and p.factors[i, k] != (k < 3)}
            operations |= {kind for kind in ("grayscale", "sigma", "solarize") if getattr(p, kind)[i]}
    assert worst <= LEVEL
    assert len(operations) == chain.operations, operations


def test_half_precision_costs_less_than_a_grey_level(by: str) -> None:
    color_ = Color(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=1, blur_p=0.5, blur_kernel=5)
    x = photos(6, 24)
    p = sample_color(color_, seed=1, epochs=torch.zeros(6).long(), ids=torch.arange(6), view="v", copy=0)
    found = apply_color(x.to(DEVICE), p, mean=MEAN, std=STD, dtype=torch.bfloat16)
    expected = torch.stack([alone(image / 255, p, i) for i, image in enumerate(x)])
    assert found.dtype == torch.bfloat16
    assert 0.01 < float((levels(found) - expected).abs().max()) < 1.0
