"""Pictures of what goes into a training and of what comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaler.cli.common import Overrides, WrongUse, group

if TYPE_CHECKING:
    from scaler.evals.checkpoints import EvaluationModel

show = group("Pictures of what goes into a training, and of what comes out of it.")

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run (its newest checkpoint) or one checkpoint, path or URL; timm:NAME; or weights, a file or a folder.",
    ),
]
Images = Annotated[str, typer.Argument(metavar="IMAGES", help="Shards (folder or URL), or a folder of images.")]
Out = Annotated[Path, typer.Option(help="The PNG to write.")]
Backbone = Annotated[str | None, typer.Option(help="Of a file of weights: timm's name of the model.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels; larger gives finer maps.", show_default="the recipe's, or timm's for the model"),
]
CropFraction = Annotated[float, typer.Option(help="Side of the centre crop, of the resized image.")]
Device = Annotated[str | None, typer.Option(help="As cpu or cuda:1.", show_default="the first GPU, or cpu")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="Random weights: the model before any training.")]


@show.command(epilog="Example: scaler show augmentations dinov2/demo data.shards=shards/train --out views.png")
def augmentations(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name such as dinov2/demo.")],
    overrides: Overrides = None,
    images: Annotated[
        str | None, typer.Option(help="Shards or a folder of images.", show_default="the recipe's data.shards")
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="Which step of the training, counted from 1.")] = 1,
    num: Annotated[int, typer.Option(min=1, help="Images.")] = 4,
    out: Out = Path("augmentations.png"),
) -> None:
    """The views that a recipe really makes of its images: crops, colours and masks, with what was drawn for each."""
    from scaler.recipe import load_recipe

    _check_png(out)
    try:
        checked = load_recipe(recipe, overrides=overrides or [])
    except ValueError as error:
        raise WrongUse(str(error)) from None
    from scaler.batches import recipe_batch
    from scaler.evals.images import open_images
    from scaler.show.views import augmentation_sheet

    index = None if images is None else open_images(images)
    batch = recipe_batch(checked, step=step, what=recipe, index=index)
    augmentation_sheet(batch, limit=num, what=recipe, place=images or checked.data.shards).save(out)
    print(out)


@show.command(epilog="Example: scaler show features runs/first photos/val --image-size 448 --out features.png")
def features(
    source: Source,
    images: Images,
    num: Annotated[int, typer.Option(min=1, help="Images, evenly spread.")] = 8,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Colour one side of the first component only, the rest is black.")
    ] = False,
    image_size: ImageSize = None,
    backbone: Backbone = None,
    random_init: RandomInit = False,
    device: Device = None,
    out: Out = Path("features.png"),
) -> None:
    """Patch features as colours, by their principal components over all images (DINOv2's picture); any backbone."""
    _check_png(out)
    from scaler.evals.images import open_images
    from scaler.show.features import feature_sheet

    model = _model(source, image_size=image_size, backbone=backbone, random_init=random_init, device=device)
    sheet = feature_sheet(model, open_images(images), num=num, foreground=foreground, what=source)
    sheet.save(out)
    print(out)


@show.command(epilog="Example: scaler show attention runs/first photos/val --out attention.png")
def attention(
    source: Source,
    images: Images,
    num: Annotated[int, typer.Option(min=1, help="Images, evenly spread.")] = 4,
    image_size: ImageSize = None,
    backbone: Backbone = None,
    random_init: RandomInit = False,
    device: Device = None,
    out: Out = Path("attention.png"),
) -> None:
    """Where the class token of a ViT's last block looks: each head, and their mean."""
    _check_png(out)
    from scaler.evals.images import open_images
    from scaler.show.attention import attention_sheet

    model = _model(source, image_size=image_size, backbone=backbone, random_init=random_init, device=device)
    attention_sheet(model, open_images(images), num=num, what=source).save(out)
    print(out)


@show.command(epilog="Example: scaler show neighbours runs/first --train shards/train --val shards/val --out near.png")
def neighbours(
    source: Source,
    train: Annotated[str, typer.Option(help="Where neighbours are looked for: shards or a folder of images.")],
    val: Annotated[str, typer.Option(help="Where the queries are from: shards or a folder of images.")],
    num: Annotated[int, typer.Option(min=1, help="Queries, evenly spread.")] = 8,
    k: Annotated[int, typer.Option(min=1, help="Neighbours of each.")] = 8,
    crop_fraction: CropFraction = 0.875,
    num_workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    cache_dir: Annotated[
        Path | None, typer.Option(help="For features.", show_default="the user's cache folder, as for scaler eval")
    ] = None,
    image_size: ImageSize = None,
    backbone: Backbone = None,
    random_init: RandomInit = False,
    device: Device = None,
    out: Out = Path("neighbours.png"),
) -> None:
    """Images with the training images that the model finds most alike, right and wrong classes framed."""
    _check_png(out)
    from scaler.evals.images import open_images
    from scaler.evals.store import Kept
    from scaler.show.neighbours import neighbour_sheet

    model = _model(source, image_size=image_size, backbone=backbone, random_init=random_init, device=device)
    sheet = neighbour_sheet(
        model,
        open_images(train),
        open_images(val),
        num=num,
        k=k,
        crop_fraction=crop_fraction,
        num_workers=num_workers,
        kept=Kept(cache_dir),
        what=source,
    )
    sheet.save(out)
    print(out)


@show.command(epilog="Example: scaler show embedding runs/first photos/val --num 400 --out map.png")
def embedding(
    source: Source,
    images: Images,
    num: Annotated[int, typer.Option(min=1, max=2000, help="Images, evenly spread.")] = 400,
    crop_fraction: CropFraction = 0.875,
    image_size: ImageSize = None,
    backbone: Backbone = None,
    random_init: RandomInit = False,
    device: Device = None,
    out: Out = Path("embedding.png"),
) -> None:
    """A map of images by their features (t-SNE): what is near is alike to the model."""
    _check_png(out)
    from scaler.evals.images import open_images
    from scaler.show.embedding import embedding_map

    model = _model(source, image_size=image_size, backbone=backbone, random_init=random_init, device=device)
    embedding_map(model, open_images(images), num=num, crop_fraction=crop_fraction, what=source).save(out)
    print(out)


@show.command(epilog="Example: scaler show run runs/first runs/second --out report.html")
def run(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, up to 8.")],
    samples: Annotated[int, typer.Option(min=0, help="Of each run's last batch, as pictures; 0: none.")] = 4,
    picture: Annotated[
        list[Path] | None, typer.Option(help="An image file that the page shows too; may be given again.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """One page that compares runs: curves, speed, memory, alarms, recipes, rejected samples, pictures.

    The page is one file and opens from a disk without a network. Runs may be unfinished, empty or damaged.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise WrongUse(f"--out {out}: the report is a web page; end the name in .html")
    _check_folder(out)
    from scaler.show.report import write_report

    for record in write_report(out, runs, samples=samples, pictures=picture or []):
        print(f"{record.name}: {record.state}")
        for problem in record.problems:
            print(f"{record.name}: {problem}")
    print(out)


def _model(source: str, **options: Any) -> EvaluationModel:
    """The model to look into, and a word on it."""
    from scaler.evals.checkpoints import load_for_evaluation

    model = load_for_evaluation(source, **options)
    if model.line:
        print(model.line)
    return model


def _check_png(out: Path) -> None:
    """Refuse a file to write before the work is done that goes into it."""
    if out.suffix.lower() != ".png":
        raise WrongUse(f"--out {out}: pictures are PNGs; end the name in .png")
    _check_folder(out)


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise WrongUse(f"--out {out}: there is no folder {out.parent}")
