"""Our SimCLR and DINOv2 beside the same backbone trained by a plain loop with lightly's losses: same steps, same data.

    python -m tests.quality.compare                              # both methods, both sets, 3 seeds: a Markdown table
    python -m tests.quality.compare --method simclr --sets digits --seeds 1 --steps 100

Ours is the product from end to end: PNG files → `scaler convert` → a recipe → the trainer → its checkpoint. Theirs is
tests/quality/peers.py. Both are evaluated alike on the training and validation pictures (tests/quality/images.py): kNN
(k 20) and scikit-learn's logistic regression on standardised features. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from scaler.collectives import World
from scaler.evals.checkpoints import load_for_evaluation
from scaler.evals.features import extract_features
from scaler.evals.knn import knn_accuracy
from scaler.methods.base import Method
from scaler.recipe import load_recipe
from scaler.train import build_method
from scaler.train import main as train
from shards.convert import convert
from shards.decode import View
from shards.index import ShardIndex
from tests.quality.images import KINDS, SETS, write_images
from tests.quality.peers import train_peer

_VIT = {
    "backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2,
    "initial_weights": "fan_in",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {
        "method": {
            "name": "simclr", **_VIT, "crop_scale": [0.5, 1.0], "color_strength": 0.5, "grayscale_probability": 0.8,
            "blur_probability": 0.0, "head_layers": 2, "head_hidden": 256, "head_out": 64, "temperature": 0.2,
        },
        "batch": 128,
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01},
        "steps": 300,
    },
    "dinov2": {
        "method": {
            "name": "dinov2", **_VIT, "layer_scale": None, "drop_path": 0.0, "group_size": 64,
            "num_local_crops": 2, "local_size": 16, "global_scale": [0.6, 1.0], "local_scale": [0.3, 0.7],
            "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale_probability": 0.8,
            "blur_kernel": 0, "solarize_probability": 0.0, "ibot_weight": 0.2,
            "num_prototypes": 256, "head_hidden": 256, "head_bottleneck": 64, "warmup_teacher_temperature": 0.04,
            "teacher_temperature": 0.04, "teacher_temperature_warmup": "0 steps", "freeze_last_layer": "0 steps",
            "momentum": 0.95,
        },
        "batch": 64,
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.04, "clip_norm": 3.0},
        "steps": 400,
    },
}  # fmt: skip
FLIP = {"photos": 0.5, "digits": 0.0}  # a mirrored digit is another sign


def write_recipe(name: str, which: str, folder: Path, *, seed: int, steps: int) -> Path:
    """The recipe of a study, in `folder`: a method on a set of pictures."""
    values = METHODS[name]
    path = folder / f"{name}-{seed}.yaml"
    sections = {
        "method": {**values["method"], "flip": FLIP[which]},
        "data": {"shards": str(folder / "shards" / "train"), "global_batch_size": values["batch"],
                 "num_workers": 0, "image_size": 32},
        "optim": values["optim"],
        "schedule": {"total": f"{steps} steps", "warmup": f"{max(1, steps // 20)} steps"},
        "strategy": {"name": "ddp", "precision": "fp32"},
        "checkpoint": {"every": f"{steps} steps"},
        "track": {"log_every": "20 steps", "wandb": "disabled", "tensorboard": False},
        "run": {"dir": str(path.with_suffix("")), "seed": seed},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(sections))
    return path


def make_pictures(which: str, folder: Path, *, count: int) -> None:
    """`folder`/images and `folder`/shards of a set: `count` pictures to train on, a quarter of that to evaluate."""
    write_images(which, folder / "images", counts={"train": count, "val": count // 4})
    for part in ("train", "val"):
        convert(folder / "images" / part, folder / "shards" / part, workers=1)


def scores(features_fn: Any, folder: Path, *, normalization: Any = Method.normalization) -> dict[str, float]:
    """kNN and linear accuracy of what `features_fn` makes of whole pictures, in percent."""
    parts: list[tuple[Tensor, Tensor]] = [
        extract_features(
            features_fn,
            ShardIndex.load(folder / "shards" / part),
            view=View("center", 32, kind="center", crop_fraction=1.0),
            batch_size=256,
            num_workers=0,
            device="cpu",
            world=World(),
            normalization=normalization,
        )
        for part in ("train", "val")
    ]
    (x, y), (queries, labels) = parts
    knn = knn_accuracy(x, y, queries, labels, k=20, num_classes=KINDS)["top1"]
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3)).fit(x.numpy(), y.numpy())
    return {"kNN": 100 * knn, "linear": 100 * linear.score(queries.numpy(), labels.numpy())}


def evaluated(method: str, side: str, which: str, folder: Path, *, seed: int, steps: int) -> dict[str, float]:
    """Train one side and score its features; sides: ours, lightly, initial (as initialised: not trained)."""
    path = write_recipe(method, which, folder, seed=seed, steps=steps)
    recipe = load_recipe(str(path))
    if side == "ours":
        with contextlib.redirect_stdout(sys.stderr):
            assert train([str(path)]) == 0
        return scores(load_for_evaluation(recipe.run.dir, device="cpu").method.features, folder)
    if side == "lightly":
        backbone = train_peer(recipe, folder / "images" / "train", steps=steps)
    else:
        initial: Any = build_method(recipe, world=World())
        backbone = initial.backbone if method == "simclr" else initial.teacher.backbone
    return scores(backbone.eval().pooled, folder)


Found = dict[tuple[str, str], dict[tuple[str, str], list[float]]]  # (method, side): (set, measure): one a seed


def table(found: Found) -> str:
    """Markdown: a row for each method and side, mean ± standard deviation over seeds, and one for the differences of
    equal seeds between ours and lightly's, mean ± standard error.
    """
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    lines = [["method", "trained by", *(f"{which}, {measure}" for which, measure in columns)]]
    lines.append(["---"] * len(lines[0]))
    for (method, side), cells in found.items():
        lines.append([method, side, *(_spread(cells.get(column, [])) for column in columns)])
        if side == "lightly":
            leads = [lead(found, method, column) for column in columns]
            lines.append([method, "ours − lightly", *(_spread(values, error=True, sign="+") for values in leads)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def lead(found: Found, method: str, column: tuple[str, str]) -> list[float]:
    """By how much ours is above lightly's, for each seed."""
    pairs = zip(found[method, "ours"][column], found[method, "lightly"][column], strict=False)
    return [ours - theirs for ours, theirs in pairs]


def _spread(values: list[float], *, error: bool = False, sign: str = "") -> str:
    if len(values) < 2:
        return f"{values[0]:{sign}.1f}" if values else "–"
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if error else 1)
    return f"{statistics.mean(values):{sign}.1f} ± {deviation:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; exit code 1 if ours is below lightly's anywhere by more than two standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), nargs="*", default=list(METHODS))
    parser.add_argument("--sets", choices=SETS, nargs="*", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every training (each method has its own number)")
    parser.add_argument("--images", type=int, default=4000, help="to train on, of each set")
    parser.add_argument("--out", type=Path, help="also write the table here, after every training")
    arguments = parser.parse_args(argv)
    found: Found = defaultdict(lambda: defaultdict(list))

    def add(method: str, side: str, which: str, seed: int, result: dict[str, float], began: float) -> None:
        for measure, value in result.items():
            found[method, side][which, measure].append(value)
        line = {"method": method, "side": side, "set": which, "seed": seed, "seconds": time.process_time() - began}
        print(json.dumps({**line, **result}), file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.write_text(table(found))

    with tempfile.TemporaryDirectory() as name:
        for which in arguments.sets:
            began = time.process_time()
            make_pictures(which, Path(name, which), count=arguments.images)
            pixels = scores(lambda x: x.flatten(1), Path(name, which), normalization=((0.0,) * 3, (1.0,) * 3))
            add("–", "raw pixels", which, 0, pixels, began)
        for seed in range(arguments.seeds):
            for which in arguments.sets:
                for method in arguments.method:
                    for side in ("initial", "ours", "lightly"):
                        began = time.process_time()
                        steps = arguments.steps or METHODS[method]["steps"]
                        result = evaluated(method, side, which, Path(name, which), seed=seed, steps=steps)
                        add(method, side, which, seed, result, began)
    print(table(found))
    behind = []
    for method in arguments.method:
        for column in found[method, "ours"]:
            values = lead(found, method, column)
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
            if statistics.mean(values) < -2 * error:
                behind.append(f"{method} on {' '.join(column)}")
    print(f"clearly below lightly: {', '.join(behind)}" if behind else "nowhere clearly below lightly")
    return int(bool(behind))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
