"""A folder of timm's: `config.json` and `model.safetensors`, which timm.create_model("local-dir:…") opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
from timm.models import save_for_hf
from torch import Tensor

from scaler.export.encoder import Encoder, PlainEncoder


def write(encoder: Encoder, place: Path, *, dynamic_size: bool) -> None:
    """Write the folder; timm's ViTs made by it take any size anyway.

    Raises:
        ValueError: timm has no such model.
    """
    if encoder.small_stem:
        raise ValueError(
            f"timm has no {encoder.architecture} with the stem for small images (method.small_stem), so nobody could "
            "load the folder: export it with --format onnx or torchscript"
        )
    model, (mean, std) = encoder.model, encoder.normalization
    facts = {
        **model.pretrained_cfg,
        "mean": mean,
        "std": std,
        "input_size": (3, encoder.image_size, encoder.image_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    for name in ("tag", "url", "hf_hub_id", "test_input_size", "test_crop_pct", "license", "origin_url", "paper_ids"):
        facts.pop(name, None)  # of timm's own weights
    model.pretrained_cfg = facts
    save_for_hf(
        model,
        str(place),
        model_config={"label_names": list(encoder.class_names)},
        model_args=encoder.model_args or None,
        safe_serialization=True,
    )
    # safetensors writes for its owner alone; an export is for others too.
    (place / "model.safetensors").chmod((place / "config.json").stat().st_mode)


def read(place: Path, encoder: Encoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What anyone gets who opens it, strictly."""
    return PlainEncoder(timm.create_model(f"local-dir:{place}", pretrained=True).eval())
