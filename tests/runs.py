"""Tiny runs of the real trainer, for the tests of exactness: recipes, shards, and readers of what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from scaler.collectives import World
from scaler.recipe import load_recipe
from scaler.train import run
from shards.convert import convert
from tests.images import make_image_folder

NUM_IMAGES = 1009  # a prime: it divides by no batch, rank count or lane count
CLASSES = 5
BATCH = 96  # 10.5 steps an epoch, so that 20 steps cross a border inside a batch

_VIT = {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 36, "num_heads": 3}

METHODS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "name": "dinov2",
        **_VIT,
        "registers": 2,
        "drop_path": 0.3,
        "group_size": 4,
        "num_local_crops": 2,
        "local_size": 16,
        "num_prototypes": 61,
        "head_hidden": 48,
        "head_bottleneck": 24,
        "separate_heads": True,
        "teacher_temperature_warmup": "5 steps",
        "freeze_last_layer": "3 steps",
    },
    # At temperature 0.1 these noise images are chaotic: gradient norms of equal runs part by a factor of 2 a step.
    "simclr": {"name": "simclr", **_VIT, "temperature": 0.5, "drop_path": 0.3, "group_size": 4},
    "supervised": {
        "name": "supervised",
        **_VIT,
        "num_classes": CLASSES,
        "drop_path": 0.3,
        "group_size": 4,
        "mixup": 0.8,
        "cutmix": 1.0,
        "ema": 0.99,
    },
    # A batch-norm network without ReLU, at whose kink the gradient norms of equal runs part by a thousandth.
    "supervised_cnn": {"name": "supervised", "backbone": "test_efficientnet", "num_classes": CLASSES},
}


def make_shards(folder: Path) -> Path:
    """The 1,009 images as shards of about 100 samples."""
    make_image_folder(folder / "images", num_images=NUM_IMAGES, classes=CLASSES, size=32, format="png", seed=1)
    convert(folder / "images", folder / "shards", shard_size="350KB", workers=1)
    return folder / "shards"


def write_recipe(path: Path, method: str, *, shards: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of 20 fp32 steps in deterministic mode with active clipping; `sections` override its values."""
    values: dict[str, dict[str, Any]] = {
        "method": METHODS[method],
        "data": {"shards": str(shards), "global_batch_size": BATCH, "num_workers": 0, "image_size": 32,
                 "shuffle_window": 50},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_norm": 0.1},
        "schedule": {"total": "20 steps", "warmup": "4 steps", "final_lr": 1e-6},
        "strategy": {"precision": "fp32"},
        "checkpoint": {"every": "1000 steps"},
        "track": {"log_every": "1 steps", "wandb": "disabled", "tensorboard": False},
        # With most seeds a unit of SimCLR's head comes so near ReLU's kink that equal runs fall on either side of it,
        # and their gradient norms part by 1e-3; with this one none does.
        "run": {"dir": str(path.with_suffix("")), "deterministic": True, "seed": 6 if method == "simclr" else 0},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path.write_text(yaml.safe_dump(values))
    return path


def train_job(world: World, recipe: str, overrides: list[str]) -> str:
    """What each process of `run_distributed` does: the whole of `scaler.train` but for starting the processes."""
    return run(load_recipe(recipe, overrides=overrides))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the columns that measure the machine."""
    machine = ("images_per_second", "data_wait", "memory_", "host_memory_gib", "gpu_utilization", "seconds/")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(machine)} for line in lines]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together from their ranges by hand."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    tensors = {}
    for name, entry in manifest["tensors"].items():
        parts = []
        for _, _, file in entry["ranges"]:
            with safe_open(checkpoint / file, framework="pt") as f:
                parts.append(f.get_tensor(name))
        tensors[name] = torch.cat(parts).view(entry["shape"])
    return tensors
