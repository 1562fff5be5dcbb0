"""The device half of the augmentation alone: views as the loader cuts them → coloured, normalised floats.

    scaler bench augment dinov2/vits16_in1k --step
    scaler bench augment simclr/resnet50_in1k --images 64 --peers kornia

By turns, on views of noise that lie where each wants them:

    scaler           `Method.augment` as a step runs it: by Triton's kernels on a GPU, by torch on a CPU
    scaler, torch    the same colours by torch's operations, where the first runs kernels
    kornia           its batched operations with the same probabilities and strengths, every image with its own; from
                     floats, the division by 255 included. It draws one order of the jitter for a whole batch
    torchvision      per image on the CPU, as people write it: PIL, and v2 on tensors

On a GPU the device is waited for at the end of each batch; torchvision's rows then are those of one CPU thread, as is
everything on a CPU, where rates are per second of processor time. kornia is no dependency: `pip install kornia` where
it is to be compared. On one H200, to show at most 5 % of the step for 10 crops of 64 images, and 5 times kornia:

    R=scaler/bench/results/$(date +%F)-h200-augment-
    scaler bench augment dinov2/vits16_in1k --images 64 --step strategy.compile=true --out ${R}vits16.json
    scaler bench augment simclr/resnet50_in1k --images 256 --step --out ${R}simclr.json
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from scaler.bench.contenders import Augmentation, color_steps
from scaler.bench.loop import prepared
from scaler.bench.rounds import Block, interleave, rate, ratio
from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.environment import environment
from scaler.methods.base import Batch, Method
from scaler.nn import color
from scaler.nn.color import Color
from scaler.nn.kernels import runs_kernels
from scaler.recipe import Recipe, load_recipe
from scaler.train import make_deterministic
from shards.decode import View

OURS, TORCH, KORNIA, PIL, V2 = "scaler", "scaler, torch", "kornia", "torchvision, PIL", "torchvision, v2"
STEP = "the whole step"
PEERS = ("kornia", "torchvision")
_WARM_UP = 3

Say = Callable[[str], None]
Work = Callable[[], Any]


def measure(
    name: str,
    *,
    overrides: Sequence[str] = (),
    images: int = 64,
    peers: Sequence[str] = PEERS,
    step: bool = False,
    seconds: float = 1.0,
    rounds: int = 5,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure a recipe's augmentation on this process's device; see the module's text.

    Args:
        name: of the recipe, its path or short name.
        overrides: `key=value` words.
        images: of a batch.
        peers: of `PEERS`.
        step: also measure the recipe's whole step on such a batch.
        seconds: of each in a round.
        rounds: turns of each.

    Returns:
        When and where it was measured, and `rows`: name, images_per_second, views_per_second, seconds of a batch,
        images_per_cpu_second, `ours_times_as_fast` (by processor time on a CPU), `blocks`; or `missing`, why not.
        `share_of_step` of ours with `step`.

    Raises:
        ValueError: an unknown peer, or a recipe that cannot be trained here.
    """
    if unknown := sorted(set(peers) - set(PEERS)):
        raise ValueError(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    make_deterministic(False)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    size = [f"data.global_batch_size={images}", "strategy.micro_batch_size=null"]
    recipe = load_recipe(name, overrides=[*size, *overrides], shards="none")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        method, strategy = prepared(recipe, device)
        works, missing = _works(recipe, method, device, images=images, peers=peers)
        if step:
            stepper = Stepper(recipe, method, strategy, world=World(), batches=[])
            stepper.batches = [noise(method, images, world=World(), device=device)]
            works[STEP] = stepper.step
        for who, work in works.items():
            say(f"warming up {who}")
            for _ in range(_WARM_UP if device.type == "cuda" else 1):
                work()
        timed = {who: partial(_until_done, work, device, images) for who, work in works.items()}
        blocks = interleave(timed, seconds=seconds, rounds=rounds, say=say)
    finally:
        torch.set_num_threads(threads)
    views = sum(view.count for view in method.views)
    clock: Any = "wall" if device.type == "cuda" else "cpu"
    rows = [_row(who, mine, blocks[OURS], images=images, views=views, clock=clock) for who, mine in blocks.items()]
    if step:
        rows[0]["share_of_step"] = 1 / ratio(blocks[OURS], blocks[STEP], clock)
    machine = environment()
    del machine["host"]
    return {
        "date": datetime.date.today().isoformat(),
        **machine,
        "command": shlex.join(["scaler", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "images": images,
        "views": {view.name: [view.count, view.size] for view in method.views},
        "dtype": str(method.image_dtype).removeprefix("torch."),
        "seconds": seconds,
        "rounds": rounds,
        "clock": clock,
        "recipe": {"name": name, **recipe.model_dump(mode="json", include={"method", "data", "strategy"})},
        "rows": rows + [{"name": who, "missing": why} for who, why in missing.items()],
    }


def _until_done(work: Work, device: torch.device, images: int) -> int:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images


def _row(
    name: str, mine: Sequence[Block], ours: Sequence[Block], *, images: int, views: int, clock: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "images_per_second": rate(mine, "wall"),
        "views_per_second": views * rate(mine, "wall"),
        "images_per_cpu_second": rate(mine, "cpu"),
        "batch_seconds": images / rate(mine, clock),
        "blocks": [vars(block) for block in mine],
    }
    if name not in (OURS, STEP):
        row["ours_times_as_fast"] = ratio(ours, mine, clock)
    return row


# ---------------------------------------------------------------------- contenders


def _works(
    recipe: Recipe, method: Method, device: torch.device, *, images: int, peers: Sequence[str]
) -> tuple[dict[str, Work], dict[str, str]]:
    """What each does with one batch, and why some cannot."""
    batch, works, missing = noise(method, images, world=World(), device=device), dict[str, Work](), dict[str, str]()
    works[OURS] = partial(method.augment, batch, seed=0, step=0)
    augmentation = Augmentation.of(recipe.method, image_size=recipe.data.image_size)
    views = [view for view in method.views if view.name in augmentation.colors]
    if runs_kernels(next(iter(batch["views"].values()))):
        works[TORCH] = partial(_ours_by_torch, batch, augmentation, views, method)
    if "kornia" in peers:
        if (why := why_no_kornia()) is None:
            works[KORNIA] = _kornia(batch, augmentation, views, method.normalization)
        else:
            missing[KORNIA] = why
    if "torchvision" in peers:
        for name, t in ((PIL, transforms), (V2, v2)):
            works[name] = _one_by_one(batch, augmentation, views, t)
    return works, missing


def _ours_by_torch(batch: Batch, augmentation: Augmentation, views: Sequence[View], method: Method) -> list[Tensor]:
    """The colours of `Method.augment` without kernels."""
    mean, std = method.normalization
    keys = {"seed": 0, "epochs": batch["epochs"], "ids": batch["ids"]}
    made = []
    for size in sorted({view.size for view in views}):
        same = [view for view in views if view.size == size]
        drawn = [
            color.sample_color(augmentation.colors[v.name], **keys, view=v.name, copy=range(v.count)) for v in same
        ]
        x = torch.cat([batch["views"][view.name].flatten(0, 1) for view in same])
        colored = color.apply_color_with_torch(x, color.concatenate(drawn), mean=mean, std=std)
        made.append(colored.to(method.image_dtype))
    return made


def _one_by_one(batch: Batch, augmentation: Augmentation, views: Sequence[View], t: Any) -> Work:
    """Every view by itself, as torchvision's transforms (PIL) or transforms.v2 (tensors) do it, on the CPU."""
    jobs = []
    for view in views:
        pixels: Any = batch["views"][view.name].flatten(0, 1).cpu()
        if t is transforms:
            pixels = [transforms.ToPILImage()(image) for image in pixels]
        jobs.append((pixels, t.Compose(color_steps(augmentation, view, t))))

    def work() -> list[Tensor]:
        return [torch.stack([transform(image) for image in pixels]) for pixels, transform in jobs]

    return work


def why_no_kornia() -> str | None:
    """Why kornia cannot be compared, in a few words; None: it can."""
    if importlib.util.find_spec("kornia") is None:
        return "not installed"
    try:
        importlib.import_module("kornia.augmentation")
    except Exception as error:  # whatever an installation that does not fit raises
        return f"cannot be imported: {type(error).__name__}"
    return None


def _kornia(batch: Batch, augmentation: Augmentation, views: Sequence[View], normalization: Any) -> Work:
    """kornia's batched operations on the views of each kind."""
    jobs = [
        (batch["views"][view.name].flatten(0, 1), kornia_chain(augmentation.colors[view.name], normalization))
        for view in views
    ]

    @torch.no_grad()
    def work() -> list[Tensor]:
        return [chain(x.float().div_(255.0)) for x, chain in jobs]

    return work


def kornia_chain(settings: Color, normalization: tuple[Sequence[float], Sequence[float]]) -> nn.Module:
    """What a `Color` says, by kornia.augmentation: float images [m, 3, h, w] from 0 to 1 → normalised; each is drawn
    for by itself."""
    K = importlib.import_module("kornia.augmentation")
    c, steps = settings, []
    if c.jitter_p and (c.brightness or c.contrast or c.saturation or c.hue):
        bounds = [(max(0.0, 1 - v), 1 + v) for v in (c.brightness, c.contrast, c.saturation)]
        steps.append(K.ColorJitter(*bounds, (-c.hue, c.hue), p=c.jitter_p))
    if c.grayscale_p:
        steps.append(K.RandomGrayscale(p=c.grayscale_p))
    if c.blur_p and c.blur_kernel:
        steps.append(K.RandomGaussianBlur((c.blur_kernel,) * 2, c.blur_sigma, p=c.blur_p))
    if c.solarize_p:
        threshold = c.solarize_threshold / 255
        steps.append(K.RandomSolarize((threshold, threshold), (0.0, 0.0), p=c.solarize_p))
    mean, std = normalization
    chain: nn.Module = K.AugmentationSequential(
        *steps, K.Normalize(torch.tensor(mean), torch.tensor(std)), data_keys=["input"]
    )
    return chain


# ---------------------------------------------------------------------- for people


def as_table(result: Mapping[str, Any]) -> Table:
    """A row each."""
    recipe = result["recipe"]
    cut = ", ".join(f"{count} of {size} px" for count, size in result["views"].values())
    title = f"{recipe['name']} on {result['device']}: {result['images']} images, each {cut}, to {result['dtype']}"
    table = Table(title=title, title_justify="left")
    table.add_column("by", no_wrap=True)
    on = "GPU" if result["clock"] == "wall" else "CPU"
    for name in (f"{on} ms", "images/s", "views/s", "images / CPU-s", "ours, times"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        if "missing" in row:
            table.add_row(row["name"], row["missing"], style="dim")
            continue
        times = f"{row['ours_times_as_fast']:.2f}" if "ours_times_as_fast" in row else ""
        rates = (f"{row[f'{name}_per_second']:,.0f}" for name in ("images", "views"))
        table.add_row(
            row["name"], f"{1000 * row['batch_seconds']:,.2f}", *rates, f"{row['images_per_cpu_second']:,.0f}", times
        )
    return table


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean, a line each."""
    for row in result["rows"]:
        if "share_of_step" in row:
            yield f"the augmentation is {row['share_of_step']:.1%} of the step, if nothing ran beside it"
        if "ours_times_as_fast" in row:
            what = "time" if result["clock"] == "wall" else "processor time"
            yield f"ours, against {row['name']}: {row['ours_times_as_fast']:.2f} times as fast in {what}"
