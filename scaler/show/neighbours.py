"""What a model finds alike: images with the training images whose features are nearest, as kNN evaluation finds them.

neighbour_sheet(model, open_images("shards/train"), open_images("shards/val"), num=8, k=8).save("neighbours.png")
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from scaler.evals.checkpoints import EvaluationModel
from scaler.evals.knn import nearest
from scaler.evals.store import Kept
from scaler.show.pixels import Images, class_name, load_images, pooled_features, spread, to_pixels
from scaler.show.sheet import RIGHT, WRONG, Cell, draw_sheet, to_image, zoomed
from shards.index import ShardIndex

_SIDE = 128  # pixels of a picture in the sheet


def neighbour_sheet(
    model: EvaluationModel,
    train: ShardIndex,
    val: ShardIndex,
    *,
    num: int,
    k: int,
    crop_fraction: float = 0.875,
    num_workers: int = 0,
    kept: Kept | None = None,
    what: str = "model",
) -> Image.Image:
    """Images of `val`, evenly spread, each before its `k` nearest images of `train` by cosine similarity.

    Where both have labels, neighbours of the query's class (by its name) have a blue frame and ✓, others an orange one
    and ✗. An image is no neighbour of itself where both are the same images.

    Args:
        kept: where features of `train` lie, or are put.
        what: the model's name, for the title.

    Raises:
        ValueError: no image that can be decoded, or fewer training images than neighbours.
    """
    images = load_images(val, spread(val, num), image_size=model.image_size, crop_fraction=crop_fraction)
    options = {"crop_fraction": crop_fraction, "num_workers": num_workers, "kept": kept}
    similarity, ids = nearest_images(
        model, train, images, k=k, leave_out=train.fingerprint == val.fingerprint, **options
    )
    shown = load_images(train, ids.unique().numpy(), image_size=model.image_size, crop_fraction=crop_fraction)
    at = {id_: row for row, id_ in enumerate(shown.ids.tolist())}
    queries, others = _pictures(model, images), _pictures(model, shown)
    rows: list[list[Cell | None]] = []
    right = labelled = 0
    for row, picture in enumerate(queries):
        name = class_name(val, int(images.labels[row]))
        cells: list[Cell | None] = [Cell(picture, [images.keys[row], "" if name is None else f"class {name}"])]
        for value, id_ in zip(similarity[row].tolist(), ids[row].tolist(), strict=True):
            other = class_name(train, int(shown.labels[at[id_]]))
            known = name is not None and other is not None
            labelled, right = labelled + known, right + (known and name == other)
            mark = "" if not known else "✓ " if name == other else "✗ "
            frame = None if not known else RIGHT if name == other else WRONG
            cells.append(Cell(others[at[id_]], [f"{value:.3f}", f"{mark}{other or shown.keys[at[id_]]}"], frame=frame))
        rows.append(cells)
    notes = [f"cosine similarity of features; {train.num_samples:,} images to choose from"]
    if labelled:
        notes.append(f"blue and ✓: the query's class, {right} of {labelled}; orange and ✗: another class")
    columns = ["query", *(f"nearest {rank + 1}" for rank in range(k))]
    return draw_sheet(rows, title=f"Nearest images by {what}", notes=notes, columns=columns)


def nearest_images(
    model: EvaluationModel, train: ShardIndex, queries: Images, *, k: int, leave_out: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Cosine similarity, float64 [n, k], and sample id, int64 [n, k], of the images of `train` that are nearest to each
    of n queries, nearest first.

    Args:
        leave_out: queries are samples of `train` themselves, and none is a neighbour of itself.
        options: of `EvaluationModel.extract`, for `train`.

    Raises:
        ValueError: fewer images than neighbours.
    """
    part = model.extract(train, **options).part
    if k + leave_out > len(part.ids):
        left = len(part.ids) - leave_out
        raise ValueError(f"{k} neighbours are more than the {left} images of {train.path}; lower k")
    similarity, found = nearest(pooled_features(model, queries.pixels), part.features, k=k + leave_out)
    ids = part.ids[found]
    if leave_out:
        own = ids == queries.ids[:, None]
        own[~own.any(dim=1), -1] = True  # as near as itself are so many that it is not among them
        similarity, ids = (values[~own].view(len(ids), k) for values in (similarity, ids))
    return similarity, ids


def _pictures(model: EvaluationModel, images: Images) -> list[Image.Image]:
    pixels = to_pixels(images.pixels, normalization=model.method.normalization)
    return [zoomed(to_image(one), size=model.image_size, side=_SIDE) for one in pixels]
