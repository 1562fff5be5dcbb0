"""Trained encoders for other programs, each file run and compared with its source before it gets its name.

    report = export("runs/first", "exported/first", format="timm")
    timm.create_model("local-dir:exported/first", pretrained=True)

Formats: `timm`, a folder with a model card; `dinov2`, the original's names in a .pth; `torchscript`; `onnx`. Every one
gives the feature of an image and the features of its patches (of the cells of a CNN's last map), and with a classifier
its scores.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scaler.evals.checkpoints import load_for_evaluation
from scaler.export import onnx_file, original, timm_folder, torchscript
from scaler.export.card import card
from scaler.export.encoder import Encoder, Part, take_encoder

__all__ = ["Format", "Part", "export"]

Format = Literal["timm", "dinov2", "torchscript", "onnx"]

_FORMATS: dict[Format, ModuleType] = {
    "timm": timm_folder,
    "dinov2": original,
    "torchscript": torchscript,
    "onnx": onnx_file,
}
_ENDINGS: dict[Format, tuple[str, ...]] = {"dinov2": (".pth",), "torchscript": (".pt",), "onnx": (".onnx",)}
_LIMIT = 1e-4  # largest difference that passes
_BATCHES = (1, 3)  # images it is tried with
_SEED = 0


def export(
    source: str,
    out: str | Path,
    *,
    format: Format = "timm",
    part: Part = "evaluated",
    classifier: bool = False,
    dynamic_size: bool = False,
    backbone: str | None = None,
    image_size: int | None = None,
    license: str | None = None,
    repository: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the encoder of any source that evaluations open (`scaler.evals.checkpoints.load_for_evaluation`).

    Args:
        out: a folder for `timm`, a file for the others.
        part: the network that evaluations use (teacher, average), or the `student` that was trained.
        classifier: with the classifier of a supervised run.
        dynamic_size: `onnx` and `torchscript`: for images of other sizes too; the others always are.
        backbone, image_size: of a file of weights, as for `load_for_evaluation`.
        license: of the weights, as the model card names it, and `repository` the hub's that it says to load.
        overwrite: replace what an earlier export left there.

    Returns:
        What was written, and `difference`, the largest of each output from the source's, absolute, or relative to the
        largest value where that is above 1.

    Raises:
        ValueError: no such source, a format that cannot hold the model, a place that is taken, or a file that gives
            other values than its source; nothing is left then.
    """
    target = check_target(out, format=format, overwrite=overwrite)
    evaluation = load_for_evaluation(source, device="cpu", backbone=backbone, image_size=image_size)
    encoder = take_encoder(source, evaluation, part=part, classifier=classifier, backbone=backbone)
    written = _FORMATS[format]
    with _put(target) as place:
        written.write(encoder, place, dynamic_size=dynamic_size)
        difference = compare(encoder, written.read(place, encoder), dynamic_size=dynamic_size)
        worst = max(difference, key=lambda name: difference[name])
        if not difference[worst] <= _LIMIT:
            raise ValueError(
                f"{target} would give other {worst} than {source}: they differ by {difference[worst]:.1e}, and at most "
                f"{_LIMIT:.0e} is let through; take another --format"
            )
        report = {
            "source": source,
            "out": str(target),
            "format": format,
            "part": part,
            "architecture": encoder.architecture,
            "image_size": encoder.image_size,
            "outputs": list(encoder.outputs),
            "parameters": sum(p.numel() for p in encoder.model.parameters()),
            "step": evaluation.step,
            "difference": difference,
        }
        if format == "timm":
            opens = f"hf-hub:{repository}" if repository else f"local-dir:{target}"
            text = card(encoder, source=source, place=opens, report=report, license=license)
            (place / "README.md").write_text(text)
        files = [path for path in place.parent.rglob("*") if path.is_file()]
        report["bytes"] = sum(path.stat().st_size for path in files)
    return report


@torch.no_grad()
def compare(
    encoder: Encoder, run: Callable[[Tensor], tuple[Tensor, ...]], *, dynamic_size: bool = False
) -> dict[str, float]:
    """The largest difference of each output between a written file and its source, over batches of 1 and 3 images.

    Raises:
        ValueError: the file does not run on them.
    """
    other = encoder.image_size + (encoder.patch_size or 32)
    sizes = [encoder.image_size, other] if dynamic_size else [encoder.image_size]
    generator, worst = torch.Generator().manual_seed(_SEED), dict.fromkeys(encoder.outputs, 0.0)
    for count, size in [(count, size) for size in sizes for count in _BATCHES]:
        images = torch.randn(count, 3, size, size, generator=generator)
        wanted = encoder.reference(images)
        try:
            found = run(images)
        except RuntimeError as error:
            raise ValueError(
                f"what was written does not run on {count} images of {size} pixels: {_last(error)}"
            ) from None
        for name, a, b in zip(encoder.outputs, found, wanted, strict=True):
            difference = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
            # Not a number counts as the largest difference.
            worst[name] = max(worst[name], difference) if difference == difference else float("inf")
    return worst


def check_target(out: str | Path, *, format: Format, overwrite: bool) -> Path:
    """Where the export goes, as a path.

    Raises:
        ValueError: no place for this format, or one that is taken.
    """
    if format not in get_args(Format):
        raise ValueError(f"no format {format!r}; valid ones are {', '.join(get_args(Format))}")
    if "://" in str(out):
        raise ValueError(f"{out} is a URL: export to a folder here, then upload it (--push for a hub)")
    target, endings = Path(out), _ENDINGS.get(format, ())
    if endings and target.suffix not in endings:
        raise ValueError(f"{target}: a {format} export is one file that ends in {' or '.join(endings)}; name it so")
    if not endings and target.suffix in {ending for group in _ENDINGS.values() for ending in group}:
        fitting = next(name for name, group in _ENDINGS.items() if target.suffix in group)
        raise ValueError(f"{target}: a timm export is a folder; name one, or give --format {fitting}")
    if target.is_dir() and endings:
        raise ValueError(f"{target} is a folder, and a {format} export is a file; name another place")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise ValueError(f"{target} exists; --overwrite replaces it, or name another place")
        if not endings and not (target / "config.json").is_file():
            raise ValueError(f"{target} exists and is no timm folder: it stays; name another place")
    return target


@contextmanager
def _put(target: Path) -> Iterator[Path]:
    """A place to write to, which becomes `target` if all goes well, with what else was written beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        place = Path(folder, target.name)
        yield place
        beside = [path for path in Path(folder).iterdir() if path != place]
        if target.is_dir():  # a folder cannot be replaced in one go: the old one steps aside
            os.rename(target, Path(folder, f"{target.name}.replaced"))
        for path in [*beside, place]:  # the named one last: what is there is whole
            os.replace(path, target.parent / path.name)


def _last(error: Exception) -> str:
    """The last line of an error that says something: a program's traceback stands before it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
