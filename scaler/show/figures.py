"""Pictures of runs and features, drawn on matplotlib figures without its global state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scaler.show.projections import plane

_MAX_POINTS = 1000  # of an embedding picture; t-SNE takes seconds for them


def demo_figure(
    path: Path,
    *,
    runs: Mapping[str, Path],
    embeddings: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    title: str = "",
) -> None:
    """Write one PNG: a row per run with its loss curve and pictures of its embeddings.

    Args:
        runs: name → `metrics.jsonl`.
        embeddings: name of a run → {caption: (features float [n, d], labels int [n])}, for example before and after.

    Raises:
        ValueError: a metrics file without a row, or features that do not fit their labels.
    """
    columns = 1 + max((len(embeddings.get(name, {})) for name in runs), default=0)
    figure = Figure(figsize=(4.6 * columns, 3.8 * max(len(runs), 1)), layout="constrained")
    grid = figure.subplots(max(len(runs), 1), columns, squeeze=False)
    for row, (name, metrics) in zip(grid, runs.items(), strict=False):
        loss_curves(row[0], {name: metrics})
        captions = embeddings.get(name, {})
        for axes, (caption, (features, labels)) in zip(row[1:], captions.items(), strict=False):
            embedding_picture(axes, features, labels)
            axes.set_title(caption, fontsize=10)
        for axes in row[1 + len(captions) :]:
            axes.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def loss_curves(axes: Axes, runs: Mapping[str, Path]) -> None:
    """Draw the loss of each run over its steps; steps whose loss was not finite leave a gap.

    Raises:
        ValueError: a metrics file without a row.
    """
    for name, path in runs.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if not rows:
            raise ValueError(f"{path} holds no row; the run has not logged a step yet (track.log_every)")
        losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
        axes.plot([row["step"] for row in rows], losses, label=name, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()


def embedding_picture(axes: Axes, features: Tensor, labels: Tensor) -> None:
    """Draw features [n, d] in the plane by t-SNE, coloured by label [n] (int, -1: none): neighbours stay neighbours.

    Raises:
        ValueError: features that do not fit their labels.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {list(features.shape)} and labels {list(labels.shape)} must be [n, d] and [n]")
    # A fixed random part of the points: every n-th could keep step with the order of the classes.
    some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:_MAX_POINTS]
    points = plane(torch.nn.functional.normalize(features[some].float(), dim=1))
    shown = labels[some]
    colors = colormaps["tab10" if int(labels.max()) < 10 else "tab20"]
    for label in shown.unique().tolist():
        x, y = points[shown == label].T.tolist()
        axes.scatter(x, y, s=7, color=colors(label % colors.N), label=str(label), linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    if 1 < len(shown.unique()) <= 10:
        axes.legend(fontsize=6, markerscale=2, loc="upper right", handletextpad=0.1)
