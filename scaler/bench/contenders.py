"""What `scaler bench loader` compares: our path, torchvision's as people write it, and those of the peers."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets, transforms
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from scaler.bench.peers import SAMPLES, Files, dali_views, tarfile_samples, why_missing
from scaler.methods.base import Method
from scaler.methods.dinov2 import augment as dinov2
from scaler.methods.dinov2.settings import Settings as DINOv2Settings
from scaler.methods.simclr import augment as simclr
from scaler.methods.simclr.settings import SimCLRSettings
from scaler.methods.supervised import augment as supervised
from scaler.nn.color import Color
from scaler.recipe import load_recipe
from shards import decode, resize
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import SampleOrder, default_lanes
from shards.reader import SampleReader

STOCK = "torchvision ImageFolder + PIL"
GEOMETRY = "torchvision v2, geometry only"
KERNEL, LIBRARY = "scaler (kernel)", "scaler (library)"
SHUFFLED = ", shuffled"
COLOURS_STOCK, COLOURS_OURS = "torchvision, image by image (PIL)", "scaler, by batch"
_BATCH, _RAW_BATCH = 32, 1024
_MEAN, _STD = Method.normalization
_SIZE = 224  # pixels of simclr and dinov2

Transform = Callable[[Any], list[Tensor]]


@dataclass
class Contender:
    """One row: each of its steps makes some images and says how many. `missing`: why it cannot."""

    part: str
    name: str
    steps: Iterator[int] | None = None
    missing: str | None = None
    foreign: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # of our own path, by stage
    images: int = 0  # that `seconds` are of

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"

    def warm_up(self) -> None:
        """Take one step; a peer whose installation fails becomes a row that says so."""
        if self.steps is None:
            return
        try:
            next(self.steps)
        except Exception as error:
            if not self.foreign:
                raise
            self.steps, self.missing = None, f"fails: {type(error).__name__} {error}".splitlines()[0]
        self.seconds.clear()
        self.images = 0


@dataclass(frozen=True)
class Augmentation:
    """Which views are cut and how each is coloured.

    `pil_blur`: stock code blurs by Pillow's filter, as MoCo, SimSiam and lightly write it; else by torchvision's
    GaussianBlur, as DINOv2 writes it (with SimCLR's 23 taps that would be seven times slower).
    """

    views: tuple[View, ...]
    colors: dict[str, Color]
    pil_blur: bool

    @classmethod
    def find(cls, name: str) -> Augmentation:
        """`simclr` or `dinov2` as published, at 224 pixels, or what a recipe (path or short name) says.

        Raises:
            ValueError: no such recipe, or one with an error.
        """
        published: Any = {"simclr": SimCLRSettings, "dinov2": DINOv2Settings}
        if name in published:
            return cls.of(published[name](), image_size=_SIZE)
        recipe = load_recipe(name)
        return cls.of(recipe.method, image_size=recipe.data.image_size)

    @classmethod
    def of(cls, settings: Any, *, image_size: int) -> Augmentation:
        """That of a method's settings."""
        size = image_size
        if settings.name == "dinov2":
            return cls(dinov2.make_views(settings, image_size=size), dinov2.make_colors(settings), pil_blur=False)
        if settings.name == "simclr":
            views, color = simclr.make_views(settings, image_size=size), simclr.make_color(settings, image_size=size)
        else:
            views, color = supervised.make_views(settings, image_size=size), supervised.make_color(settings)
        return cls(views, {view.name: color for view in views}, pil_blur=True)


def contenders(files: Files, augmentation: Augmentation, *, peers: Sequence[str]) -> Iterator[Contender]:
    """All rows; the files of a peer are written when its first step is taken."""
    missing = {peer: why_missing(peer) for peer in peers}

    def of_peer(part: str, peer: str, suffix: str, steps: Iterator[int]) -> Contender:
        return Contender(part, peer + suffix, None if missing[peer] else steps, missing[peer], foreign=True)

    by_pil, by_v2 = (partial(stock_chain, augmentation, t) for t in (transforms, v2))
    yield Contender("everything", STOCK, _image_folder(files, by_pil(geometry=True, colors=True)))
    yield Contender("everything", "torchvision v2", _paths(files, by_v2(geometry=True, colors=True)))
    for peer in (peer for peer in peers if peer in SAMPLES):
        steps = _opened_by_pil(SAMPLES[peer](files, True), by_pil(geometry=True, colors=True))
        yield of_peer("everything", peer, " + PIL", steps)
    if "dali" in peers:
        steps = dali_views(files, augmentation.views, augmentation.colors, batch_size=_BATCH)
        yield of_peer("everything", "dali", " (no solarisation)", steps)
    yield from _ours("everything", files, augmentation, colors=True)

    yield Contender("worker", "PIL, geometry only", _image_folder(files, by_pil(geometry=True, colors=False)))
    yield Contender("worker", GEOMETRY, _paths(files, by_v2(geometry=True, colors=False)))
    if "dali" in peers:
        steps = dali_views(files, augmentation.views, None, batch_size=_BATCH)
        yield of_peer("worker", "dali", ", geometry only", steps)
    yield from _ours("worker", files, augmentation, colors=False)

    yield Contender("colours", COLOURS_STOCK, _colored_one_by_one(files, augmentation, transforms))
    yield Contender("colours", "torchvision v2, image by image", _colored_one_by_one(files, augmentation, v2))
    yield Contender("colours", COLOURS_OURS, _colored_by_batch(files, augmentation))

    data = [path.read_bytes() for path in files.paths()[0]]
    if all(item[:2] == b"\xff\xd8" for item in data):  # JPEG
        yield Contender("decode", "simplejpeg", _each(simplejpeg.decode_jpeg, data))
    yield Contender("decode", "torchvision", _each(_decode_by_torchvision, data))
    yield Contender("decode", "PIL", _each(_open, data))

    for shuffled, order in ((False, ", in order"), (True, SHUFFLED)):
        if not shuffled:
            yield Contender("raw", "tarfile" + order, _count(tarfile_samples(files)))
        for peer in (peer for peer in peers if peer in SAMPLES):
            yield of_peer("raw", peer, order, _count(SAMPLES[peer](files, shuffled)))
        yield Contender("raw", "scaler" + order, _count(_our_samples(files, shuffled)))


# ---------------------------------------------------------------------- ours


def _ours(part: str, files: Files, augmentation: Augmentation, *, colors: bool) -> Iterator[Contender]:
    for name, cut in ((KERNEL, resize.cut_with_kernel), (LIBRARY, resize.cut_with_torch)):
        contender = Contender(part, name)
        if cut is resize.cut_with_kernel and resize.cut is resize.cut_with_torch:
            contender.missing = "not compiled here"
        else:
            contender.steps = _our_steps(contender, files, augmentation, cut, colors=colors)
        yield contender


def _our_steps(
    contender: Contender, files: Files, augmentation: Augmentation, cut: Callable[..., None], *, colors: bool
) -> Iterator[int]:
    """Batches as a worker makes them, in this process; with `colors` also what follows on the training device."""
    batches = _our_batches(files, augmentation)
    while True:
        began = time.perf_counter()
        with _cutting_by(cut):
            batch = next(batches)
        loaded = time.perf_counter()
        stages = {**batch["seconds"], "all else": loaded - began - sum(batch["seconds"].values())}
        if colors:
            _color(batch, augmentation)
            stages["colours"] = time.perf_counter() - loaded
        for stage, value in stages.items():
            contender.seconds[stage] = contender.seconds.get(stage, 0.0) + value
        contender.images += _BATCH
        yield _BATCH


@contextlib.contextmanager
def _cutting_by(cut: Callable[..., None]) -> Iterator[None]:
    """Decode with this way of cutting views, where there are two."""
    names = vars(decode)
    kept, names["cut"] = names["cut"], cut
    try:
        yield
    finally:
        names["cut"] = kept


def _our_batches(files: Files, augmentation: Augmentation) -> Iterator[dict[str, Any]]:
    index = ShardIndex.load(files.shards)
    return iter(
        ShardLoader(
            index,
            _order(index, _BATCH),
            views=augmentation.views,
            seed=0,
            global_batch_size=_BATCH,
            micro_batch_size=_BATCH,
        )
    )


def _order(index: ShardIndex, batch: int) -> SampleOrder:
    return SampleOrder(index.shard_sizes, seed=0, lanes=default_lanes(index.num_samples, [batch]), shuffle_window=2048)


def _our_samples(files: Files, shuffled: bool) -> Iterator[bytes]:
    index = ShardIndex.load(files.shards)
    reader, order = SampleReader(index), _order(index, _RAW_BATCH)
    for start in itertools.count(0, _RAW_BATCH):
        ids = np.arange(start, start + _RAW_BATCH) % len(index)
        for sample in index.spans(order.batch(start, _RAW_BATCH).ids if shuffled else ids):
            yield reader.read(sample)


def _color(batch: dict[str, Any], augmentation: Augmentation) -> None:
    dinov2.color_crops(batch, augmentation.colors, seed=0, mean=_MEAN, std=_STD)  # of any method's views


def _colored_by_batch(files: Files, augmentation: Augmentation) -> Iterator[int]:
    batch = next(_our_batches(files, augmentation))
    while True:
        _color(batch, augmentation)
        yield _BATCH


# ---------------------------------------------------------------------- torchvision, and what others do with PIL


def stock_chain(augmentation: Augmentation, t: Any, *, geometry: bool, colors: bool) -> Transform:
    """The transforms of all views as people write them with `t`, torchvision's transforms or transforms.v2."""
    made = []
    for view in augmentation.views:
        steps: list[Any] = []
        if geometry:
            kind = transforms.InterpolationMode(view.interpolation)
            steps += [
                t.RandomResizedCrop(view.size, scale=view.scale, ratio=view.ratio, interpolation=kind, antialias=True),
                t.RandomHorizontalFlip(view.flip),
            ]
        if colors:
            steps += color_steps(augmentation, view, t)
        elif t is transforms:
            steps.append(t.PILToTensor())
        made += [t.Compose(steps)] * view.count
    return lambda image: [transform(image) for transform in made]


def color_steps(augmentation: Augmentation, view: View, t: Any) -> list[Any]:
    """The colour transforms of a view as people write them with `t`, to normalised floats."""
    c, steps = augmentation.colors[view.name], []
    if c.jitter_p:
        steps.append(t.RandomApply([t.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue)], c.jitter_p))
    if c.grayscale_p:
        steps.append(t.RandomGrayscale(c.grayscale_p))
    if c.blur_p and c.blur_kernel:
        by_pil = augmentation.pil_blur and t is transforms
        blur = _PilBlur(c.blur_sigma) if by_pil else t.GaussianBlur(c.blur_kernel, c.blur_sigma)
        steps.append(t.RandomApply([blur], c.blur_p))
    if c.solarize_p:
        steps.append(t.RandomSolarize(c.solarize_threshold, c.solarize_p))
    steps.append(t.ToTensor() if t is transforms else t.ToDtype(torch.float32, scale=True))
    return [*steps, t.Normalize(_MEAN, _STD)]


class _PilBlur:
    """Gaussian blur by Pillow, its deviation drawn for each image."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class _Paths(Dataset[list[Tensor]]):
    """Files → views by torchvision's own decoder and v2 transforms."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(decode_image(read_file(str(self.paths[i])), ImageReadMode.RGB))


def _image_folder(files: Files, transform: Transform) -> Iterator[int]:
    return _batches(datasets.ImageFolder(str(files.folder), transform=transform))


def _paths(files: Files, transform: Transform) -> Iterator[int]:
    return _batches(_Paths(files.paths()[0], transform))


def _batches(dataset: Any) -> Iterator[int]:
    size = min(_BATCH, len(dataset))
    loader = DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True)
    while True:
        for _ in loader:
            yield size


def _opened_by_pil(samples: Iterator[bytes], transform: Transform) -> Iterator[int]:
    while True:
        default_collate([transform(_open(data)) for data in itertools.islice(samples, _BATCH)])
        yield _BATCH


def _colored_one_by_one(files: Files, augmentation: Augmentation, t: Any) -> Iterator[int]:
    """The same colours on every single view, cut beforehand, and batches of the results."""
    batch = next(_our_batches(files, augmentation))
    work = []
    for view in augmentation.views:
        images: Any = batch["views"][view.name].flatten(0, 1)
        if t is transforms:
            images = [transforms.ToPILImage()(image) for image in images]
        work.append((images, t.Compose(color_steps(augmentation, view, t))))
    while True:
        for images, transform in work:
            torch.stack([transform(image) for image in images])
        yield _BATCH


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _decode_by_torchvision(data: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _each(function: Callable[[bytes], Any], data: Sequence[bytes]) -> Iterator[int]:
    for item in itertools.cycle(data):
        function(item)
        yield 1


def _count(samples: Iterator[bytes]) -> Iterator[int]:
    while True:
        yield sum(1 for _ in itertools.islice(samples, _RAW_BATCH))
