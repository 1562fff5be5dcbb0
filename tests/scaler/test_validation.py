"""Scoring held-out images during training: exactly once each on any layout, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaler.batches import run_batch
from scaler.checkpoint import complete_checkpoints
from scaler.evals.checkpoints import load_for_evaluation
from scaler.evals.features import Part, normalized
from scaler.evals.knn import knn_accuracy, knn_scores
from scaler.train import main
from scaler.validation import evenly_spread
from shards.convert import convert
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches
from tests.distributed.helper import run_distributed
from tests.images import make_image_folder
from tests.long import only_long
from tests.runs import CLASSES, NUM_IMAGES, make_shards, rows, train_job, weights, write_recipe

NUM_HELD_OUT = 53  # a prime: it fills no batch and no number of ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Held-out shards, with one picture that cannot be decoded among them."""
    folder = tmp_path_factory.mktemp("held_out")
    make_image_folder(folder / "images", num_images=NUM_HELD_OUT, classes=CLASSES, size=32, format="png", seed=2)
    bad = sorted((folder / "images").rglob("*.png"))[7]
    bad.write_bytes(bad.read_bytes()[:-40])
    convert(folder / "images", folder / "shards", shard_size="20KB", workers=1)
    return folder / "shards"


def recipe(
    path: Path, shards: Path, held_out: Path | None, method: str = "supervised_cnn", **sections: dict[str, Any]
) -> Path:
    data = {"global_batch_size": 24, "val_shards": None if held_out is None else str(held_out)}
    return write_recipe(
        path,
        method,
        shards=shards,
        data={**data, **sections.pop("data", {})},
        schedule={"total": "8 steps", "warmup": "2 steps"},
        **sections,
    )


def scores(run_dir: Path) -> dict[int, dict[str, float]]:
    """What the evaluations of a run said, by step."""
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("val/")} for row in rows(run_dir)}
    return {step: values for step, values in found.items() if values}


def accuracy_by_hand(run_dir: Path, held_out: Path) -> tuple[float, int]:
    """Top-1 of a run's last weights, image by image, and of how many images."""
    model = load_for_evaluation(run_dir, device="cpu")
    index, right, seen = ShardIndex.load(held_out), 0, 0
    for batch in evaluation_batches(index, view=View("x", 32, kind="center", crop_fraction=0.875), batch_size=1):
        if batch["weights"][0]:
            with torch.no_grad():
                out = model.method.evaluate(normalized(batch["images"], model.method.normalization), batch["labels"])
            right, seen = right + int(out["top1"][0]), seen + 1
    return right / seen, seen


def test_every_image_is_scored_once_and_training_goes_on_as_if_nothing_had_been(shards, held_out, tmp_path):
    with_scores = recipe(tmp_path / "with.yaml", shards, held_out, evaluate={"every": "3 steps", "batch_size": 10})
    without = recipe(tmp_path / "without.yaml", shards, None)
    assert main([str(with_scores)]) == main([str(without)]) == 0
    found = scores(tmp_path / "with")
    assert list(found) == [3, 6, 8] and all(values["val/rejected"] == 1 for values in found.values())
    by_hand, seen = accuracy_by_hand(tmp_path / "with", held_out)
    assert seen == NUM_HELD_OUT - 1 and found[8]["val/top1"] == by_hand
    assert found[3]["val/loss"] > 0

    plain = [{k: v for k, v in row.items() if not k.startswith("val/")} for row in rows(tmp_path / "with")]
    assert plain == rows(tmp_path / "without")
    last = "checkpoints/step-00000008"
    before = weights(tmp_path / "without" / last)
    assert all(value.equal(before[name]) for name, value in weights(tmp_path / "with" / last).items())


@pytest.mark.parametrize("method", ["dinov2", pytest.param("simclr", marks=only_long)])
def test_features_are_scored_by_neighbours_and_training_goes_on_as_if_nothing_had_been(
    shards, held_out, tmp_path, method, capfd
):
    evaluate = {"every": "3 steps", "batch_size": 10, "neighbours": 200, "k": 7}
    with_scores = recipe(tmp_path / "with.yaml", shards, held_out, method, evaluate=evaluate)
    without = recipe(tmp_path / "without.yaml", shards, None, method)
    assert main([str(with_scores)]) == 0
    assert "evaluation: every 3 steps, 53 images by a kNN among 200 training images" in capfd.readouterr().out
    assert main([str(without)]) == 0
    found = scores(tmp_path / "with")
    assert list(found) == [3, 6, 8] and all(values["val/rejected"] == 1 for values in found.values())
    best = json.loads((tmp_path / "with" / "best.json").read_text())
    assert best["val/top1"] == max(values["val/top1"] for values in found.values())

    model, train = load_for_evaluation(tmp_path / "with", device="cpu"), ShardIndex.load(shards)
    some = evenly_spread(np.arange(NUM_IMAGES), 200)
    assert len(set(some)) == 200 and set(np.diff(some)) == {5, 6}
    (x, y), (queries, labels) = model.features(train), model.features(ShardIndex.load(held_out))
    by_hand = knn_accuracy(x[some], y[some], queries, labels, k=7, num_classes=CLASSES)
    assert found[8]["val/top1"] == pytest.approx(by_hand["top1"], abs=1.01 / (NUM_HELD_OUT - 1))  # one borderline image

    plain = [{k: v for k, v in row.items() if not k.startswith("val/")} for row in rows(tmp_path / "with")]
    assert plain == rows(tmp_path / "without")
    before = weights(tmp_path / "without" / "checkpoints" / "step-00000008")
    after = weights(tmp_path / "with" / "checkpoints" / "step-00000008")
    assert after.keys() == before.keys() and all(value.equal(before[name]) for name, value in after.items())


def test_without_labels_in_the_training_images_the_held_out_ones_classify_each_other(shards, held_out, tmp_path):
    """And features that are no numbers any more classify nothing, while the loss tells what happened."""
    make_image_folder(tmp_path / "images", num_images=24, classes=0, size=32, format="png", seed=1)
    convert(tmp_path / "images", tmp_path / "unlabelled", workers=1)
    options = {"evaluate": {"every": "1 steps", "k": 5}, "track": {"log_every": "1 steps"}}
    path = recipe(tmp_path / "run.yaml", tmp_path / "unlabelled", held_out, "dinov2", **options)
    assert main([str(path), "run.stop_after=1 steps"]) == 0
    model, index = load_for_evaluation(tmp_path / "run", device="cpu"), ShardIndex.load(held_out)
    x, labels = model.features(index)
    part = Part(torch.arange(len(labels)), labels, x)
    by_hand = knn_scores(part, part, ks=[5], num_classes=CLASSES, leave_out=True)[5]
    found = scores(tmp_path / "run")[1]
    assert found["val/top1"] == pytest.approx(by_hand["top1"], abs=1.01 / (NUM_HELD_OUT - 1))
    assert main([str(path), "run.max_nonfinite=1", "run.max_rewinds=0", "optim.lr=1e30", "optim.clip_norm=null",
                 f"run.dir={tmp_path / 'diverged'}"]) == 1  # fmt: skip
    assert min(values["val/top1"] for values in scores(tmp_path / "diverged").values()) == 0.0


@pytest.mark.parametrize(
    ("method", "strategy", "ranks"),
    [
        ("supervised_cnn", "fsdp2", 2),
        ("dinov2", "zero3", 2),
        *(pytest.param(*values, marks=only_long) for values in (
            ("supervised_cnn", "zero3", 2), ("supervised_cnn", "ddp", 3),
            ("dinov2", "fsdp2", 3), ("simclr", "zero3", 2), ("simclr", "zero1", 2), ("simclr", "ddp", 3),
        )),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_scores(shards, held_out, tmp_path, method, strategy, ranks):
    evaluate = {"every": "4 steps", "neighbours": 100}
    alone = recipe(tmp_path / "alone.yaml", shards, held_out, method, evaluate=evaluate)
    assert main([str(alone)]) == 0
    path = recipe(tmp_path / "many.yaml", shards, held_out, method, evaluate={**evaluate, "batch_size": 5})
    run_distributed(train_job, ranks, str(path), [f"strategy.name={strategy}"])
    one, many = scores(tmp_path / "alone"), scores(tmp_path / "many")
    assert one.keys() == many.keys() == {4, 8}
    for step in one:
        if method == "supervised_cnn":
            assert many[step]["val/loss"] == pytest.approx(one[step]["val/loss"], rel=1e-4)
        assert abs(many[step]["val/top1"] - one[step]["val/top1"]) <= 1.01 / (NUM_HELD_OUT - 1)  # one borderline image


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(shards, held_out, tmp_path):
    options = {"evaluate": {"every": "2 steps", "patience": 2}, "optim": {"lr": 1e-12}, "checkpoint": {"keep_last": 1}}
    path = recipe(tmp_path / "run.yaml", shards, held_out, **options)
    assert main([str(path)]) == 0
    run_dir = tmp_path / "run"
    # At a learning rate of nothing only the running statistics move; the first best stays or a later one is kept.
    best = json.loads((run_dir / "best.json").read_text())
    found = scores(run_dir)
    top = max(values["val/top1"] for values in found.values())
    assert best["val/top1"] == top and best["step"] == min(s for s, v in found.items() if v["val/top1"] == top)
    ended = json.loads((run_dir / "exit.json").read_text())
    assert ended["step"] == min(8, best["step"] + 4) and ended["reason"] == (
        "patience" if ended["step"] < 8 else "done"
    )
    names = {c.name for c in complete_checkpoints(run_dir / "checkpoints")}
    assert names == {f"step-{best['step']:08d}", f"step-{ended['step']:08d}"}
    before = rows(run_dir)
    assert main([str(path)]) == 0  # an ended run stays ended
    assert rows(run_dir) == before
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == ended["reason"]


def test_a_resumed_run_remembers_its_best(shards, held_out, tmp_path):
    options = {"evaluate": {"every": "1 steps"}}
    whole = recipe(tmp_path / "whole.yaml", shards, held_out, **options)
    parts = recipe(tmp_path / "parts.yaml", shards, held_out, **options)
    assert main([str(whole)]) == 0
    for stop in ("3 steps", "5 steps", "8 steps"):
        assert main([str(parts), f"run.stop_after={stop}"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert (tmp_path / "parts" / "best.json").read_text() == (tmp_path / "whole" / "best.json").read_text()


def test_what_cannot_be_scored_is_refused_or_said(shards, held_out, tmp_path, capfd):
    path = recipe(tmp_path / "run.yaml", shards, held_out)
    make_image_folder(tmp_path / "others", num_images=12, classes=3, size=32, format="png", seed=3)
    convert(tmp_path / "others", tmp_path / "other_shards", workers=1)
    assert main([str(path), f"data.val_shards={tmp_path / 'other_shards'}"]) == 1
    assert "labels would not mean the same" in capfd.readouterr().err
    assert main([str(path), "data.val_shards=null", "evaluate.patience=3", "run.stop_after=1 steps"]) == 0
    assert "the section evaluate is set, without effect" in capfd.readouterr().out
    words = [str(path), "run.stop_after=2 steps"]
    assert main([*words, "data.val_shards=null", "checkpoint.keep_best=true"]) == 0
    assert "keep_best is set, without effect: data.val_shards names no images" in capfd.readouterr().out
    assert main([*words, "evaluate.k=3", "run.stop_after=3 steps"]) == 0, "an evaluation may change on the way"
    assert "evaluate.k is set, without effect: supervised is scored by its own classifier" in capfd.readouterr().out
    make_image_folder(tmp_path / "flat", num_images=5, classes=0, size=32, format="png", seed=3)
    convert(tmp_path / "flat", tmp_path / "flat_shards", workers=1)
    assert main([*words, f"data.val_shards={tmp_path / 'flat_shards'}"]) == 1
    assert "has no labels, and only labelled images can be scored" in capfd.readouterr().err


def test_a_run_of_stages_is_the_same_in_parts(shards, tmp_path, capfd):
    """Batch-size ramp-up and progressive resolution, stopped inside stages and at their borders."""
    stages = [
        {"until": "3 steps", "global_batch_size": 8, "image_size": 16},
        {"until": "48 images", "global_batch_size": 12},
    ]
    data = {"stages": stages, "num_workers": 1}
    for name in ("whole", "parts"):
        write_recipe(
            tmp_path / f"{name}.yaml", "dinov2", shards=shards, schedule={"total": "7 steps", "warmup": "2 steps"},
            data={"global_batch_size": 24, **data}, strategy={"micro_batch_size": 4},
        )  # fmt: skip
    assert main([str(tmp_path / "whole.yaml")]) == 0
    assert "8 images of 16 px from step 1 on, 12 images of 32 px from step 4 on" in capfd.readouterr().out
    for stop in ("2 steps", "3 steps", "4 steps", "7 steps"):
        assert main([str(tmp_path / "parts.yaml"), f"run.stop_after={stop}"]) == 0
    table = rows(tmp_path / "whole")
    assert [row["images"] for row in table] == [8, 16, 24, 36, 48, 72, 96]
    assert rows(tmp_path / "parts") == table
    batch = run_batch(tmp_path / "whole", step=5)
    assert (batch.first_image, len(batch.keys()), batch.stage.image_size) == (36, 12, 32)
