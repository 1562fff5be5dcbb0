"""`scaler demo`: the whole path on a laptop's CPU, with ordinary commands that are printed as they run.

Handwritten digits as PNG files → shards → SimCLR and DINOv2, sharded over two processes by FSDP2; one process of the
second training is killed on the way and the same command started again → kNN accuracy of raw pixels, of the models
before training and after it → a picture.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from scaler.checkpoint import complete_checkpoints
from scaler.collectives import World
from scaler.digits import SIZE, write_digits
from scaler.evals.checkpoints import load_for_evaluation
from scaler.evals.features import extract_features
from scaler.evals.knn import knn_accuracy
from scaler.show.figures import demo_figure
from shards.decode import View
from shards.index import ShardIndex

METHODS = ("simclr", "dinov2")
KILLED = "dinov2"  # the training that loses a process on the way
PROCESSES = 2
_MADE_BY = "demo.json"  # marks a folder as ours, which may be cleared
_CROP = 1.0  # the digits reach to the border: evaluate whole images
_SAY_EVERY = 10.0  # seconds between lines of progress

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class Score:
    """kNN accuracy and features of one model."""

    top1: float
    features: Tensor
    labels: Tensor


def run_demo(folder: Path, *, say: Say = _say) -> dict[str, float]:
    """Run all stages in `folder`, clearing what an earlier demo left there; returns top-1 accuracies by name.

    Raises:
        ValueError: the folder holds something that is not a demo's; a command failed; training did not help.
    """
    start = time.monotonic()

    def stage(title: str) -> None:
        say(f"\n[{time.monotonic() - start:3.0f} s] {title}")

    prepare_folder(folder)
    images, shards = folder / "images", {part: folder / "shards" / part for part in ("train", "val")}

    stage("1/5  Images: every scanned digit in a colour, size and place of its own, on a background of its own")
    counts = write_digits(images)
    say(f"     {counts['train']} training and {counts['val']} validation PNGs in class folders: {images}")

    stage("2/5  Shards: WebDataset tars with an index")
    for part, path in shards.items():
        command(["convert", str(images / part), str(path)], log=folder / "convert.log", say=say)
    for number, method in enumerate(METHODS):
        stage(f"{3 + number}/5  Train {method} with FSDP2 on {PROCESSES} processes")
        train(method, folder=folder, shards=shards["train"], kill=method == KILLED, say=say)

    stage("5/5  kNN top-1 (k 20): raw pixels, models as initialised, models as trained")
    scores = evaluate(folder, shards=shards, say=say)
    demo_figure(
        folder / "demo.png",
        runs={method: folder / method / "metrics.jsonl" for method in METHODS},
        embeddings={
            method: {
                f"{when}: kNN {100 * scores[f'{method} {when}'].top1:.0f} %": (
                    scores[f"{method} {when}"].features,
                    scores[f"{method} {when}"].labels,
                )
                for when in ("initialised", "trained")
            }
            for method in METHODS
        },
        title="scaler demo: loss, and t-SNE of the validation features, coloured by digit",
    )
    top1 = {name: score.top1 for name, score in scores.items()}
    (folder / _MADE_BY).write_text(json.dumps(top1) + "\n")
    print_table(top1)
    say(f"Loss curves and embeddings: {folder / 'demo.png'}")
    say(f"Runs: {', '.join(str(folder / method) for method in METHODS)}   ({time.monotonic() - start:.0f} s in all)")
    for method in METHODS:
        if top1[f"{method} trained"] < top1[f"{method} initialised"] + 0.1:
            raise ValueError(f"{method} is not clearly better after training than before: {top1}")
    return top1


def prepare_folder(folder: Path) -> None:
    """An empty folder for the demo.

    Raises:
        ValueError: it holds files, and no demo made them.
    """
    if folder.exists():
        if not (folder / _MADE_BY).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not from a demo; choose another place with --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MADE_BY).write_text("{}\n")


def command(words: list[str], *, log: Path, say: Say) -> None:
    """Run `scaler WORDS` to its end, its output going to `log`.

    Raises:
        ValueError: it failed; with the end of its output.
    """
    with running(words, log=log, say=say) as process:
        if process.wait():
            raise ValueError(failure(words, log))


@contextmanager
def running(words: list[str], *, log: Path, say: Say) -> Iterator[subprocess.Popen[bytes]]:
    """Start `scaler WORDS` as a user would, and show it; it ends with the block."""
    # Two processes cannot share one GPU; the demo is small enough for the CPU.
    hide = 0 < torch.cuda.device_count() < PROCESSES and words[0] == "train"
    say("     $ " + ("CUDA_VISIBLE_DEVICES= " if hide else "") + shlex.join(["scaler", *words]) + f"   > {log}")
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide else {})}
    words = [sys.executable, "-m", "scaler.cli", *words]
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def failure(words: list[str], log: Path) -> str:
    """What to say when a command failed."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith("error:")] or lines[-5:]
    return "\n".join([f"`{shlex.join(['scaler', *words])}` failed; its output is in {log}:", *told[-5:]])


# ---------------------------------------------------------------------- training


def train(method: str, *, folder: Path, shards: Path, kill: bool, say: Say) -> None:
    """Train `METHOD/demo` to its end; with `kill`, one of its processes is killed after a checkpoint, and it resumes.

    Raises:
        ValueError: the training failed, or its metrics do not hold every step once.
    """
    run, log = folder / method, folder / f"{method}.log"
    words = ["train", f"{method}/demo", f"data.shards={shards}", f"run.dir={run}", "strategy.name=fsdp2"]
    words += ["--processes", str(PROCESSES)]
    if kill:
        with running(words, log=log, say=say) as process:
            victim = watch(process, run, log=log, until_checkpoint=True, say=say)
            if victim is None:
                raise ValueError(failure(words, log) if process.wait() else f"{method} ended before it could be killed")
            step = last_step(run)
            victim.kill()
            process.wait()
        saved = complete_checkpoints(run / "checkpoints")[0]
        say(f"     kill -9 {victim.pid}   (one of its {PROCESSES} processes, at step {step}; the others end with it)")
        say(f"     newest complete checkpoint: {saved}; the same command again goes on from there:")
    with running(words, log=log, say=say) as process:
        watch(process, run, log=log, until_checkpoint=False, say=say)
        if process.wait():
            raise ValueError(failure(words, log))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if steps != list(range(1, len(steps) + 1)):
        raise ValueError(f"{run / 'metrics.jsonl'} does not hold every step from 1 to {len(steps)} once")
    say(f"     every step from 1 to {len(steps)} is in {run / 'metrics.jsonl'} once")


def watch(
    process: subprocess.Popen[bytes], run: Path, *, log: Path, until_checkpoint: bool, say: Say
) -> psutil.Process | None:
    """Report progress until the training ends (None), or until it has a checkpoint and has gone on from it.

    Returns then the process of the last rank.
    """
    said, heard = time.monotonic(), log.stat().st_size
    introduced = False
    while process.poll() is None:
        time.sleep(0.1)
        if not introduced and (told := introduction(log, start=heard)):
            introduced = True
            for line in told:
                say(f"     {line}")
        if introduced and time.monotonic() - said > _SAY_EVERY and (row := last_row(run)):
            said = time.monotonic()
            say(f"     step {row['step']}  loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s")
        found = complete_checkpoints(run / "checkpoints") if until_checkpoint else []
        if found and last_step(run) > int(found[0].name.removeprefix("step-")) + 3:
            return find_rank(process.pid, PROCESSES - 1)
    return None


def introduction(log: Path, *, start: int) -> list[str]:
    """What a training says of itself before its first step, from byte `start` of its log on; [] before that step."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    if not any(line.startswith("step ") for line in lines):
        return []
    return [line for line in lines if line.startswith(("engaged:", "resuming"))]


def find_rank(launcher: int, rank: int) -> psutil.Process:
    """The training process of `rank` below the process `launcher`."""
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except psutil.Error:
            continue  # it ended meanwhile
    raise ValueError(f"process {launcher} has no child of rank {rank}")


def last_row(run: Path) -> dict[str, Any]:
    """The newest whole row of the run's metrics, or {}."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return {}
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else {}


def last_step(run: Path) -> int:
    """The newest step in the run's metrics, or 0."""
    return int(last_row(run).get("step", 0))


# ---------------------------------------------------------------------- evaluation


def evaluate(folder: Path, *, shards: dict[str, Path], say: Say) -> dict[str, Score]:
    """kNN of the validation images by the training images: raw pixels, and each method before and after training."""
    train, val = (ShardIndex.load(path) for path in shards.values())
    scores = {"pixels": pixel_score(train, val, grey=False), "grey pixels": pixel_score(train, val, grey=True)}
    for method in METHODS:
        for when, random_init in (("initialised", True), ("trained", False)):
            words = ["eval", "knn", str(folder / method), "--train", str(train.path), "--val", str(val.path)]
            words += ["--crop-fraction", str(_CROP), *(["--random-init"] if random_init else [])]
            say("     $ " + shlex.join(["scaler", *words]))
            model = load_for_evaluation(folder / method, random_init=random_init)
            parts = [model.features(index, crop_fraction=_CROP) for index in (train, val)]
            scores[f"{method} {when}"] = knn_score(parts, num_classes=len(train.class_names))
    return scores


def pixel_score(train: ShardIndex, val: ShardIndex, *, grey: bool) -> Score:
    """What pixels alone score: the image itself as its features, or its brightness, for one who knows the trick."""
    parts = [
        extract_features(
            lambda images: (rgb_to_grayscale(images) if grey else images).flatten(1),
            index,
            view=View("center", SIZE, kind="center", crop_fraction=_CROP),
            batch_size=256,
            num_workers=0,
            device="cpu",
            world=World(),
            normalization=((0.0,) * 3, (1.0,) * 3),
        )
        for index in (train, val)
    ]
    return knn_score(parts, num_classes=len(train.class_names))


def knn_score(parts: list[tuple[Tensor, Tensor]], *, num_classes: int) -> Score:
    """Accuracy of the second part's samples by their neighbours in the first."""
    (x, y), (queries, labels) = parts
    top1 = knn_accuracy(x, y, queries, labels, k=20, temperature=0.07, num_classes=num_classes)["top1"]
    return Score(top1, queries, labels)


def print_table(top1: dict[str, float]) -> None:
    """Accuracies side by side."""
    table = Table("kNN top-1", *METHODS)
    for name, title in (("pixels", "raw pixels"), ("grey pixels", "grey pixels (told that colour is noise)")):
        table.add_row(title, *[f"{100 * top1[name]:.1f} %"] * len(METHODS))
    for when, title in (("initialised", "random initialisation"), ("trained", "after training")):
        table.add_row(title, *[f"{100 * top1[f'{method} {when}']:.1f} %" for method in METHODS])
    Console().print(table)
