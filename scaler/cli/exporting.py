"""Models for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from scaler.cli.common import Json, WrongUse, print_table

exporting = typer.Typer()


@exporting.command(
    epilog="Example: scaler export runs/first exported/first        then, anywhere: "
    "timm.create_model('local-dir:exported/first', pretrained=True)"
)
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A run (its newest checkpoint) or one checkpoint, path or URL; timm:NAME; or weights, a file "
            "(.safetensors, .pth, …) or a folder of timm's."
        ),
    ],
    out: Annotated[str, typer.Argument(help="A folder for timm; a file .pth, .pt or .onnx for the others.")],
    format: Annotated[
        Literal["timm", "dinov2", "torchscript", "onnx"],
        typer.Option(help="timm's folder; the original DINOv2's names; TorchScript; ONNX."),
    ] = "timm",
    part: Annotated[
        Literal["evaluated", "student"],
        typer.Option(help="The network that evaluations use (teacher or average), or the one that was trained."),
    ] = "evaluated",
    classifier: Annotated[
        bool, typer.Option("--classifier", help="Of a supervised run, the classifier too: scores.")
    ] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="onnx, torchscript: for images of other sizes too.")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="Of a file of weights: timm's name of the model.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels.", show_default="the recipe's, or timm's for the model")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, for the model card, as apache-2.0.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the timm folder to this repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trained encoder for other programs, and compare what was written with the source.

    It gives the feature of an image and those of its patches. What differs by more than 1e-4 is refused.
    """
    from scaler import export as room
    from scaler.export import hub

    if push is not None and format != "timm":
        raise WrongUse(f"--push uploads a timm folder, not {format}: leave out --format, or --push")
    if private and push is None:
        raise WrongUse("--private is for --push")
    if push is not None:
        hub.check_repository(push)
    report = room.export(
        source,
        out,
        format=format,
        part=part,
        classifier=classifier,
        dynamic_size=dynamic_size,
        backbone=backbone,
        image_size=image_size,
        license=license,
        repository=push,
        overwrite=overwrite,
    )
    if push is not None:
        report["pushed"] = hub.push(Path(out), push, private=private)
    if as_json:
        print(json.dumps(report))
        return
    difference = ", ".join(f"{name} {value:.1e}" for name, value in report.pop("difference").items())
    report["outputs"] = ", ".join(report["outputs"])
    report["parameters"] = f"{report['parameters']:,}"
    report["MB"] = f"{report.pop('bytes') / 1e6:.1f}"
    facts = {name.replace("_", " "): fact for name, fact in report.items() if fact is not None}
    print_table({**facts, "largest difference": difference})
