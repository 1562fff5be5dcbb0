"""Training and looking at runs from Python, in a notebook above all.

    run = scaler.train("simclr/demo", shards="shards/train", dir="runs/first", processes=2, **{"optim.lr": 1e-3})
    run = scaler.Run("runs/first")

The training is the one that `scaler train` starts, in processes of its own: a notebook that is restarted has lost
nothing but the view of it, its memory stays free, and the same cell run again goes on from the last checkpoint.
"""

from __future__ import annotations

import html
import io
import json
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from launch.local import environment, signals_to, train_command
from scaler.checkpoint import run_checkpoints
from scaler.checkpoint.manifest import step_of
from scaler.data import open_data
from scaler.recipe import Recipe, load_recipe
from scaler.show.runs import Floats, RunRecord, read_run

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scaler.evals.checkpoints import EvaluationModel

_STEP = re.compile(r"step (\d+)/(\d+)\s+(.*)")  # as `scaler.console.ProgressLine` prints it
_TAIL = 40  # lines kept for a failure without a word of its own
_PANELS = ("loss", "val/top1", "lr", "images_per_second")


def train(
    recipe: str | Path,
    *,
    shards: str | Path | None = None,
    dir: str | Path | None = None,
    processes: int = 1,
    **overrides: Any,
) -> Run:
    """Train, or go on training where the run directory's newest checkpoint stands, and show how far it is.

    An interrupt (the notebook's stop button, Ctrl-C) asks for a checkpoint and an orderly end; the same call goes on
    from there.

    Args:
        recipe: a YAML file, or a short name such as dinov2/demo.
        shards: `data.shards`. dir: `run.dir`.
        processes: on this machine, one per GPU.
        overrides: any value of the recipe, as **{"optim.lr": 1e-3}.

    Raises:
        ValueError: what is wrong with the recipe or the data, or why the run ended.
    """
    named = {"data.shards": shards, "run.dir": dir}
    given = {**{key: value for key, value in named.items() if value is not None}, **overrides}
    words = [f"{key}={_word(value)}" for key, value in given.items()]
    checked = load_recipe(str(recipe), overrides=words)
    open_data(checked)  # what is wrong with the data is said here, instead of by every process
    command = train_command(str(recipe), words, processes=processes, strategy=checked.strategy.name)
    folder, cell = Path(checked.run.dir), _Cell()
    before, lines = _written(folder), deque[str](maxlen=_TAIL)
    told: dict[str, None] = {}  # errors, in order; every rank may say the same

    def say(line: str) -> None:
        if line.startswith("error: "):
            told[line.removeprefix("error: ")] = None
        elif not told:  # what launchers add to an error is about themselves
            lines.append(line)
            cell.say(line)

    code, stopped = _watch(command, processes=processes, say=say)
    ended: dict[str, Any] = {}
    if _written(folder) != before:  # else it is of an earlier start, and this one did not come that far
        ended = json.loads((folder / "exit.json").read_text())
    if ended.get("reason") == "signal":
        print(f"stopped after a checkpoint, at step {ended['step']}: run this again to go on")
    elif stopped and not ended:
        raise KeyboardInterrupt("stopped before the first step")
    elif code:
        raise ValueError(ended.get("error") or "\n".join(told or ["the training ended without a word:", *lines]))
    return Run(folder)


def load(source: str | Path, **options: Any) -> EvaluationModel:
    """Any model that evaluations open; see `scaler.evals.checkpoints.load_for_evaluation`."""
    from scaler.evals.checkpoints import load_for_evaluation

    return load_for_evaluation(source, **options)


class Run:
    """A run directory, read anew at every look: it may still be training.

    Raises:
        ValueError: there is no run there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise ValueError(f"{self.folder} is no run directory: it holds no recipe.yaml")

    @property
    def record(self) -> RunRecord:
        """All that its files say."""
        return read_run(self.folder)

    @property
    def recipe(self) -> Recipe:
        """With every default written out."""
        return load_recipe(str(self.folder / "recipe.yaml"))

    @property
    def metrics(self) -> dict[str, Floats]:
        """The columns of metrics.jsonl, float64 [rows]: NaN where a row lacks it, infinity where it was not finite."""
        return self.record.columns

    @property
    def state(self) -> str:
        """How it stands: done, running, stopped, failed and why."""
        return self.record.state

    def plot(self, *columns: str) -> Picture:
        """Curves over the steps, a panel a column; of none: loss, scores, learning rate and speed.

        Raises:
            ValueError: a column that the run has not logged.
        """
        record = self.record
        unknown = [name for name in columns if name not in record.columns]
        if unknown or not record.columns:
            known = ", ".join(record.columns) or "none: it has not logged a step yet"
            raise ValueError(f"{self.folder} has no column {(*unknown, 'at all')[0]!r}; it has {known}")
        names = columns or tuple(name for name in _PANELS if name in record.columns)
        figure = Picture(figsize=(3.6 * len(names), 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            axes.plot(*record.series(name), linewidth=1.2, marker="." if len(record.series(name)[0]) < 20 else None)
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        return figure

    def sheet(self, step: int, *, limit: int = 8, augmented: bool = False) -> Image.Image:
        """The first samples of a step and their views, as the loader's workers cut them or as the network gets them."""
        from scaler.batches import run_batch
        from scaler.show.views import contact_sheet

        return contact_sheet(run_batch(self.folder, step=step), limit=limit, augmented=augmented)

    def model(self, step: int | None = None, **options: Any) -> EvaluationModel:
        """The model of its newest checkpoint, or of the one at `step`, ready to be evaluated.

        Raises:
            ValueError: no such checkpoint.
        """
        if step is None:
            return load(self.folder, **options)
        found = {step_of(place.name): place for place in run_checkpoints(self.folder)}
        if step not in found:
            there = ", ".join(map(str, sorted(found))) or "none"
            raise ValueError(f"{self.folder} has no checkpoint of step {step}; it has {there}")
        return load(str(found[step]), **options)

    def features(self, place: str | Path, **options: Any) -> tuple[Tensor, Tensor]:
        """Features float32 [n, d] and labels int64 [n] (-1: none) of shards or a folder of images."""
        from scaler.evals.images import open_images

        return self.model().features(open_images(place), **options)

    def knn(self, train: str | Path, val: str | Path, **options: Any) -> dict[str, float]:
        """kNN accuracy of labelled images by labelled neighbours, both shards or class folders."""
        from scaler.evals.images import open_images

        return self.model().knn(open_images(train), open_images(val), **options)

    def embedding(self, place: str | Path, **options: Any) -> Picture:
        """Features of labelled images in the plane, by t-SNE, coloured by class; `options` go to `features`."""
        from scaler.show.figures import embedding_picture

        figure = Picture(figsize=(5, 4.4), layout="constrained")
        embedding_picture(figure.subplots(), *self.features(place, **options))
        return figure

    def export(self, out: str | Path, **options: Any) -> dict[str, Any]:
        """The model for other programs; see `scaler.export.export`."""
        from scaler.export import export

        return export(str(self.folder), out, **options)

    def _repr_html_(self) -> str:
        record = self.record
        facts = {"run": str(self.folder), "state": record.state}
        if record.recipe:
            facts["recipe"] = f"{record.recipe['method']['name']}, {record.recipe['method']['backbone']}"
        for name, form in (("step", "{:.0f}"), ("images", "{:,.0f}"), ("loss", "{:.4g}"), ("val/top1", "{:.1%}")):
            if (value := record.last(name)) is not None:
                facts[name] = form.format(value)
        cells = (f"<tr><th>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in facts.items())
        return f"<table>{''.join(cells)}</table>"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self.state}"


class Picture(Figure):
    """A matplotlib figure that a notebook shows, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


class _Cell:
    """What a training says: in a notebook one bar that moves, and the other lines as they come; else all lines."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._moves = Console().is_jupyter

    def say(self, line: str) -> None:
        step = _STEP.match(line) if self._moves else None
        if step is None:
            print(line, flush=True)
            return
        from IPython.display import HTML, display

        done, total, figures = step.groups()
        bar = HTML(
            f'<progress value="{done}" max="{total}" style="width: 12em; vertical-align: middle"></progress> '
            f"<code>{done}/{total} &nbsp; {html.escape(figures)}</code>"
        )
        if self._handle is None:
            self._handle = display(bar, display_id=True)
        else:
            self._handle.update(bar)


def _watch(command: list[str], *, processes: int, say: Callable[[str], None]) -> tuple[int, bool]:
    """Run `command`, hand over each line that it prints, and turn whatever asks to stop into a request to save first.

    Returns its exit code, and whether it was asked to stop. What it prints from then on is left out: launchers tell of
    such an end at length.
    """
    asked: list[int] = []
    child: subprocess.Popen[str] | None = None

    def stop(number: int) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    with signals_to(stop):
        child = subprocess.Popen(
            command,
            env=_plain(environment(processes)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # what interrupts the notebook is passed on from here, once
        )
        if asked:
            child.send_signal(signal.SIGTERM)
        with child:
            assert child.stdout is not None
            for line in map(str.rstrip, child.stdout):
                if not asked:
                    say(line)
    return child.returncode, bool(asked)


def _plain(environment: dict[str, str]) -> dict[str, str]:
    """For output a line at a time: a kernel tells its children that they write to a terminal, in colours."""
    asks = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {**{key: value for key, value in environment.items() if key not in asks}, "PYTHONUNBUFFERED": "1"}


def _written(folder: Path) -> int | None:
    """When exit.json was written; None: never."""
    path = folder / "exit.json"
    return path.stat().st_mtime_ns if path.exists() else None


def _word(value: Any) -> str:
    """A recipe's value as on the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
