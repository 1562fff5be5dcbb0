"""What a recipe makes of its images: the loader's crops and the method's colours and masks, beside the pictures that
they are from.

    batch = recipe_batch(load_recipe("dinov2/demo"), step=1, what="dinov2/demo")
    augmentation_sheet(batch, limit=4, what="dinov2/demo", place="shards/train").save("views.png")
    contact_sheet(run_batch(Path("runs/first"), step=120), augmented=True).save("batch.png")

Everything is made by the code that trains, for the same step: these are the pixels that the network gets, but for the
normalisation, which is undone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scaler.batches import RunBatch, Viewed
from scaler.methods.base import Shown
from scaler.nn.color import BRIGHTNESS, CONTRAST, HUE, SATURATION, sample_color
from scaler.show.pixels import class_name, to_pixels
from scaler.show.sheet import PALETTE, Cell, draw_sheet, to_image, zoomed
from shards.decode import View, boxes, decode_picture, inspect
from shards.reader import SampleReader
from shards.resize import Cut

_SIDE = 192  # pixels that the largest view is enlarged to, or made smaller to
_SMALL = 64  # the same of small ones in a contact sheet
_KEY = 136  # pixels for the name of a sample there
_HATCH = 9  # pixels from line to line
_MOST_PARTS = 8  # micro-batches that are looked through for different images
_JITTER = {BRIGHTNESS: "brightness ×{:.2f}", CONTRAST: "contrast ×{:.2f}", SATURATION: "saturation ×{:.2f}",
           HUE: "hue {:+.2f} turns"}  # fmt: skip


def augmentation_sheet(batch: RunBatch, *, limit: int, what: str, place: str) -> Image.Image:
    """A row for each of `limit` images of the batch: the picture with the boxes that are cut from it, then each view
    with what was drawn for it, masked patches hatched.

    Args:
        what, place: names of the recipe and of the images, for the title.
    """
    rows: list[list[Cell | None]] = []
    titles: list[str] = []
    seen: set[int] = set()
    masks = False
    for viewed in itertools.islice(batch.views(at_least=limit, augmented=True), _MOST_PARTS):
        titles = [f"{_title(shown, viewed)} · {shown.images.shape[-1]} px" for shown in viewed.views]
        masks = any(shown.masks is not None for shown in viewed.views)
        first = {id_: row for row, id_ in reversed(list(enumerate(viewed.shown_ids()))) if id_ not in seen}
        chosen = sorted(first.values())[: limit - len(rows)]
        seen |= first.keys()
        rows += _rows(batch, viewed, chosen)
        if len(rows) == limit:
            break
    notes = [f"{len(rows)} of the {batch.stage.global_batch_size} samples of step {batch.step}, from {place}"]
    if masks:
        notes.append("hatched patches are masked: the student does not see them, and is to say what the teacher sees")
    return draw_sheet(rows, title=f"What {what} makes of its images", notes=notes, columns=["image", *titles])


def _rows(batch: RunBatch, viewed: Viewed, chosen: list[int]) -> Iterator[list[Cell | None]]:
    """The cells of some samples of a micro-batch."""
    cuts = viewed.method.views_at(batch.stage.image_size)
    colors = dict(zip((view.name for view in cuts), PALETTE * len(cuts), strict=False))
    reader, ids = SampleReader(batch.index), viewed.shown_ids()
    pictures = _pictures(viewed, chosen, side=_SIDE)
    for number, row in enumerate(chosen):
        entry = batch.index.entry(ids[row])
        data = reader.read(entry)
        info = inspect(data, max_pixels=batch.recipe.data.max_pixels)
        drawn_for = {"epoch": int(viewed.raw["epochs"][row]), "sample_id": int(viewed.raw["ids"][row])}
        places = {view.name: boxes(view, info, seed=batch.recipe.run.seed, **drawn_for) for view in cuts}
        picture = to_image(decode_picture(data, info, 1)[0])
        words = [entry.key, f"{picture.width} × {picture.height} pixels"]
        name = class_name(batch.index, entry.label)
        words += [] if name is None else [f"class {name}"]
        cells: list[Cell | None] = [Cell(_with_boxes(picture, places, cuts, colors), words)]
        for shown, views in zip(viewed.views, pictures, strict=True):
            words = [*_box_words(places[shown.view][shown.copy], picture), *_drawn(batch, viewed, shown, row)]
            cells.append(Cell(views[number], words, frame=colors[shown.view]))
        yield cells


def contact_sheet(batch: RunBatch, *, limit: int = 64, augmented: bool = False) -> Image.Image:
    """The batch's first `limit` samples in rows of several: the key of each and its views, as the workers cut them or
    `augmented`, with colours and masks."""
    viewed = next(batch.views(at_least=limit, augmented=augmented))
    chosen = list(range(min(limit, len(viewed.raw["ids"]))))
    size = max(shown.images.shape[-1] for shown in viewed.views)
    pictures = _pictures(viewed, chosen, side=_SMALL if size < _SMALL else min(size, _SIDE))
    wanted = batch.index.keys(viewed.raw["ids"][chosen].numpy())
    samples: list[list[Cell | None]] = []
    for row, key in enumerate(batch.index.keys(viewed.shown_ids()[: len(chosen)])):
        words = [key] if key == wanted[row] else [key, "in place of", wanted[row]]
        name = Cell(Image.new("RGB", (_KEY, 1), "white"), words)
        samples.append([name, *(Cell(views[row]) for views in pictures), None])  # a gap before the next
    width, height = _KEY + sum(views[0].width for views in pictures), pictures[0][0].height
    per_row = max(1, round(math.sqrt(len(samples) * height / width)))  # about as wide as high
    rows = [list(itertools.chain(*samples[i : i + per_row])) for i in range(0, len(samples), per_row)]
    names = ["", *(_title(shown, viewed) for shown in viewed.views), ""] * min(per_row, len(samples))
    kind = "as the network gets them" if augmented else "as the loader's workers cut them"
    title = f"Step {batch.step}: {len(samples)} of {batch.stage.global_batch_size} samples, {kind}"
    return draw_sheet(rows, title=title, columns=names)


def hatched(picture: Image.Image, masks: NDArray[np.bool_]) -> Image.Image:
    """A view whose masked patches, bool [h', w'], are grey with diagonal lines; the others keep their pixels."""
    hidden = Image.fromarray(masks).resize(picture.size, Image.Resampling.NEAREST)
    y, x = np.indices((picture.height, picture.width))
    lines = np.where((x + y) % _HATCH < 2, 110, 190).astype(np.uint8)
    return Image.composite(Image.fromarray(lines).convert("RGB"), picture, hidden)


def _pictures(viewed: Viewed, chosen: list[int], *, side: int) -> list[list[Image.Image]]:
    """For each view the pictures of the chosen samples, with their masks, the largest view enlarged to `side`."""
    size = max(shown.images.shape[-1] for shown in viewed.views)
    views = []
    for shown in viewed.views:
        pixels = to_pixels(shown.images[chosen], normalization=viewed.method.normalization)
        pictures = [zoomed(to_image(one), size=size, side=side) for one in pixels]
        if shown.masks is not None:
            masks = shown.masks[chosen].cpu().numpy()
            pictures = [hatched(*pair) for pair in zip(pictures, masks, strict=True)]
        views.append(pictures)
    return views


def _title(shown: Shown, viewed: Viewed) -> str:
    copies = sum(other.view == shown.view for other in viewed.views)
    return f"{shown.view} {shown.copy + 1}" if copies > 1 else shown.view


def _box_words(box: Cut, picture: Image.Image) -> Iterator[str]:
    yield f"{box.height * box.width / (picture.height * picture.width):.0%} of the area"
    if box.flip:
        yield "mirrored"


def _drawn(batch: RunBatch, viewed: Viewed, shown: Shown, row: int) -> Iterator[str]:
    """What was drawn for one view of one sample, in the order in which it is applied, a line each."""
    keys = {name: viewed.raw[name][row : row + 1] for name in ("epochs", "ids")}
    p = sample_color(shown.color, seed=batch.recipe.run.seed, **keys, view=shown.view, copy=shown.copy)
    if p.jitter[0]:
        neutral = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, HUE: 0.0}
        for operation in p.order[0].tolist():
            if (factor := float(p.factors[0, operation])) != neutral[operation]:
                yield _JITTER[operation].format(factor).replace("-", "−")
    if p.grayscale[0]:
        yield "grey"
    if p.sigma[0] > 0:
        yield f"blur σ {p.sigma[0]:.2f} px"
    if p.solarize[0]:
        yield "solarised"
    if shown.masks is not None and (share := float(shown.masks[row].float().mean())):
        yield f"{share:.0%} masked"
    yield from shown.notes[row : row + 1]


def _with_boxes(
    picture: Image.Image, places: dict[str, list[Cut]], cuts: tuple[View, ...], colors: dict[str, str]
) -> Image.Image:
    """The picture at its size in the sheet with the outline of each crop, white inside of the colour to stand out."""
    small = zoomed(picture, size=max(picture.size), side=_SIDE)
    factor = small.width / picture.width
    pen = ImageDraw.Draw(small)
    for view in reversed([view for view in cuts if not view.drawn_as]):
        for box in places[view.name]:
            top, left = box.top * factor, box.left * factor
            shape = (left, top, left + box.width * factor - 1, top + box.height * factor - 1)
            pen.rectangle(shape, outline="white", width=4)
            pen.rectangle(shape, outline=colors[view.name], width=3)
    return small
