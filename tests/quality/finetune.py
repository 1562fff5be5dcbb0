"""What pre-training is worth when labels are few: fine-tuning on 10 % of them, beside training from scratch.

    python -m tests.quality.finetune                   # some minutes of one core: a Markdown table
    python -m tests.quality.finetune --seeds 1 --pretraining 100

The product from end to end on the digits of `scaler demo`: PNG files → shards → simclr/demo on all 1,437 training
pictures without their labels → supervised/demo on every tenth of them with its label, scored on the 360 of the
validation part after the last step. All rows share the pre-trained backbone, the labelled pictures and the recipe but
for what their name says; the seed is that of the initial weights, the order and the augmentation.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from scaler.digits import write_digits
from scaler.recipe import load_recipe
from scaler.train import run
from shards.convert import convert
from tests.runs import rows

STEPS = (300, 900)
EVERY = 10  # of so many pictures one has a label

_COMMON = [
    "strategy.name=ddp", "strategy.precision=fp32", "data.num_workers=0", "checkpoint.every=100000 steps",
    "track.wandb=disabled", "track.tensorboard=false", "track.log_every=50 steps",
]  # fmt: skip
_PRETRAINED = ["method.initial_weights=published"]  # which the weights take the place of
ROWS: dict[str, tuple[bool, list[str]]] = {  # from the pre-trained backbone, overrides
    "from scratch": (False, []),
    "fine-tuned, the same recipe": (True, []),
    "fine-tuned, layer decay 0.5": (True, ["optim.layer_decay=0.5"]),
    "fine-tuned, frozen backbone": (True, ["method.freeze_backbone=true", "optim.lr=1e-2"]),
}


def make_shards(folder: Path) -> dict[str, int]:
    """`folder`/shards/train, labelled and val; returns their numbers of pictures."""
    write_digits(folder / "images")
    for kind in sorted((folder / "images" / "train").iterdir()):
        target = folder / "images" / "labelled" / kind.name
        target.mkdir(parents=True)
        for picture in sorted(kind.iterdir())[::EVERY]:
            shutil.copy(picture, target)
    parts = ("train", "labelled", "val")
    for part in parts:
        convert(folder / "images" / part, folder / "shards" / part, workers=1)
    return {part: len(list((folder / "images" / part).glob("*/*.png"))) for part in parts}


def pretrain(folder: Path, *, steps: int) -> Path:
    """SimCLR on all training pictures; returns the run."""
    out, shards = folder / "pretrained", folder / "shards" / "train"
    run(load_recipe("simclr/demo", overrides=[
        *_COMMON, f"data.shards={shards}", f"run.dir={out}", f"schedule.total={steps} steps"
    ]))  # fmt: skip
    return out


def top1(folder: Path, name: str, *, pretrained: Path, steps: int, seed: int) -> float:
    """Validation accuracy in percent of a row's training, after its last step."""
    starts_there, overrides = ROWS[name]
    out = folder / f"{name}-{steps}-{seed}".replace(" ", "-").replace(",", "")
    run(load_recipe("supervised/demo", overrides=[
        *_COMMON, *overrides, *([f"method.weights={pretrained}", *_PRETRAINED] if starts_there else []),
        f"data.shards={folder / 'shards' / 'labelled'}", f"data.val_shards={folder / 'shards' / 'val'}",
        "data.global_batch_size=48", f"schedule.total={steps} steps", f"evaluate.every={steps} steps",
        "evaluate.crop_fraction=1.0", "checkpoint.keep_best=false", f"run.dir={out}", f"run.seed={seed}",
    ]))  # fmt: skip
    return 100 * float(rows(out)[-1]["val/top1"])


def main() -> int:
    """Print the table; exit code 1 if fine-tuning with layer decay is not better than training from scratch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=400, help="steps of SimCLR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {(row, steps): [] for row in ROWS for steps in STEPS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = make_shards(folder)
        pretrained = pretrain(folder, steps=arguments.pretraining)
        for seed in range(arguments.seeds):
            for (row, steps), values in found.items():
                values.append(top1(folder, row, pretrained=pretrained, steps=steps, seed=seed))
    heads = [f"top-1 on {counts['val']} after {steps} steps" for steps in STEPS]
    print(f"\n| {counts['labelled']} labelled pictures | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}")
    for row in ROWS:
        print(f"| {row} | {' | '.join(_spread(found[row, steps]) for steps in STEPS)} |")
    means = {key: statistics.mean(values) for key, values in found.items()}
    tuned = max(means["fine-tuned, layer decay 0.5", steps] for steps in STEPS)
    scratch = max(means["from scratch", steps] for steps in STEPS)
    return int(tuned <= scratch)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} %" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
