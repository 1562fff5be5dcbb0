"""The model card of an exported folder: what was trained on what, how well it does, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml

from scaler.export.encoder import Encoder, find_origin
from scaler.show.runs import RunRecord, read_run

# Columns of the metrics that tell of the model (others tell of the machine), and entries of an evaluation.
_LOGGED = ("loss", "val/", "accuracy")
_EVALUATED = ("top1", "top5", "loss")
_PACKAGES = ("scaler", "timm", "torch")
_SAMPLES = ("train_samples", "val_samples")

_USE = """\
```python
import timm, torch
from PIL import Image

model = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.no_grad():
    tokens = model.forward_features(image)                      # of all patches
    features = model.forward_head(tokens, pre_logits=True)      # of the image, [1, {width}]
```
"""


def card(encoder: Encoder, *, source: str, place: str, report: Mapping[str, Any], license: str | None) -> str:
    """The card's text, with all that the source still knows of its training.

    Args:
        source: what was exported.
        place: what timm opens: `hf-hub:user/name`, or `local-dir:` and the folder.
        report: of the export, see `scaler.export.export`.
        license: of the weights; None: not stated.
    """
    manifest, run_dir = find_origin(source)
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-classification" if encoder.num_classes else "image-feature-extraction",
        "tags": ["timm", "scaler", *([manifest["recipe"]["method"]["name"]] if manifest else [])],
        **({"license": license} if license else {}),
    }
    record = read_run(run_dir) if run_dir else None
    scores: dict[str, Any] = {}
    if manifest and record:
        scores = dict(_scores(record, step=manifest["step"], evaluated=report["part"] == "evaluated"))
    checked = ", ".join(f"{key} {value:.1e}" for key, value in report["difference"].items())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {PurePosixPath(place.partition(':')[2]).name}\n",
        _what(encoder, manifest, part=report["part"]),
        f"## Use\n\n{_USE.format(place=place, width=encoder.model.head_hidden_size)}",
        _table("Model", _model_facts(encoder, report)),
        _table("Training", _training_facts(manifest, record)) if manifest else "",
        _table("Scores", scores) if scores else "",
        f"The files were loaded by timm and compared with their source: largest differences {checked}.\n",
        _table("Exported with", {package: metadata.version(package) for package in _PACKAGES}),
        "## Licence\n\n" + (f"{license}\n" if license else "Not stated by who exported this; ask before you use it.\n"),
        _recipe(manifest["recipe"]) if manifest else "",
    ]
    return "\n".join(part for part in parts if part)


def _what(encoder: Encoder, manifest: Mapping[str, Any] | None, *, part: str) -> str:
    """A sentence on what this is."""
    with_head = f" with a classifier of {encoder.num_classes} classes" if encoder.num_classes else ""
    if manifest is None:
        return f"`{encoder.architecture}`{with_head}, exported by scaler.\n"
    network = "" if part == "evaluated" else f"; the {part}'s weights"
    method, images = manifest["recipe"]["method"]["name"], manifest["images"]
    return f"`{encoder.architecture}`{with_head}, trained by {method} on {images:,} images with scaler{network}.\n"


def _model_facts(encoder: Encoder, report: Mapping[str, Any]) -> dict[str, Any]:
    mean, std = encoder.normalization
    settings = encoder.model_args
    return {
        "architecture": f"timm's `{encoder.architecture}`",
        **{key: settings[key] for key in ("depth", "embed_dim", "num_heads", "patch_size") if key in settings},
        **({"registers": settings["reg_tokens"]} if settings.get("reg_tokens") else {}),
        "parameters": f"{report['parameters']:,}",
        "image size": f"{encoder.image_size} pixels",
        "normalisation": f"mean {list(mean)}, deviation {list(std)}, of pixels from 0 to 1",
    }


def _training_facts(manifest: Mapping[str, Any], record: RunRecord | None) -> dict[str, Any]:
    recipe, images, step = manifest["recipe"], manifest["images"], manifest["step"]
    facts = {
        "method": recipe["method"]["name"],
        "steps": f"{step:,}",
        "images seen": f"{images:,}",
        "global batch": recipe["data"]["global_batch_size"],
        "data": f"`{_name(recipe['data']['shards'])}`",
    }
    if epochs := _at(record, "epoch", step=step):
        facts["images in the data"] = f"{round(_at(record, 'images', step=step) / epochs):,}"
    if manifest.get("fingerprint"):
        facts["fingerprint of the data"] = f"`{manifest['fingerprint']}`"
    facts["seed"] = recipe["run"]["seed"]
    saved_by = manifest.get("saved_by", {})
    units = {"strategy": "", "ranks": " ranks", "precision": ""}
    facts["strategy"] = ", ".join(f"{saved_by[key]}{unit}" for key, unit in units.items() if key in saved_by)
    machine = {} if record is None else record.report.get("environment", {})
    if machine:
        gpus = machine["gpus"]
        facts["machine"] = f"{len(gpus)} × {gpus[0]}" if gpus else f"{machine['cpu']}, {machine['cores']} cores"
        packages = machine["packages"]
        facts["software"] = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name))
    return facts


def _scores(record: RunRecord, *, step: int, evaluated: bool) -> Iterator[tuple[str, str]]:
    """What evaluations of this checkpoint found, and the last values in the metrics."""
    for found in record.evaluations if evaluated else ():
        if found.get("step") == step:
            how = [f"{key} {found[key]}" for key in ("k",) if key in found]
            how += [f"{found[part]:,} {part.replace('_', ' ')}" for part in _SAMPLES if part in found]
            values = (f"{name} {found[name]:.4g}" for name in _EVALUATED if isinstance(found.get(name), float))
            yield f"{found.get('evaluation')} ({', '.join(how)})", ", ".join(values)
    for name in record.columns:
        if name.startswith(_LOGGED) and (value := _at(record, name, step=step)) is not None:
            yield f"{name} at step {step:,}", f"{value:.4g}"


def _at(record: RunRecord | None, name: str, *, step: int) -> Any:
    """The last finite value of a column up to a step; None: there is none."""
    steps, values = (np.empty(0), np.empty(0)) if record is None else record.series(name)
    there = values[(steps <= step) & np.isfinite(values)]
    return float(there[-1]) if len(there) else None


def _table(title: str, facts: Mapping[str, Any]) -> str:
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), ""])


def _recipe(recipe: Mapping[str, Mapping[str, Any]]) -> str:
    """The recipe, folded away, without where things lay on the machine that trained."""
    shared = {
        section: {
            key: _name(value) if isinstance(value, str) and "/" in value else value
            for key, value in values.items()
            if key not in ("cache_dir", "dir")
        }
        for section, values in recipe.items()
    }
    text = yaml.safe_dump(shared, sort_keys=False, width=100)
    return f"<details><summary>Recipe</summary>\n\n```yaml\n{text}```\n\n</details>\n"


def _name(place: str) -> str:
    """The last two parts of a path or URL: enough to know it by, and no more."""
    return "/".join(PurePosixPath(place).parts[-2:])
