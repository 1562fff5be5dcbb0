"""One HTML page about one run or several: curves, speed, memory, alarms, what differs between them, rejected samples,
pictures.

    write_report(Path("report.html"), [Path("runs/first"), Path("runs/second")])

The page is one file that needs no network: style, script, numbers and pictures are in it, and its content policy
forbids everything else. Long curves are thinned to what a screen can show, without losing a spike.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaler.nested import flatten
from scaler.show.runs import Floats, RunRecord, read_runs, thinned

_MOST_RUNS = 8
_MOST_POINTS = 1200  # of a curve
_MOST_SAMPLES = 50  # of a table of rejected samples
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

# Groups of plots: title, and which columns of metrics.jsonl, in this order; the first group that fits takes a column.
GROUPS: tuple[tuple[str, str], ...] = (
    ("Loss", r"loss|loss/.*"),
    ("Evaluation on held-out images", r"val/.*"),
    ("Signs of health", r"accuracy|embedding_std|prototype_entropy|agreement|grad_norm|negatives|rejected|.*_scale"),
    ("Schedules", r"lr|weight_decay|momentum|teacher_temperature|last_layer_lr.*|gram_.*"),
    ("Speed", r"images_per_second|data_wait|gpu_utilization|seconds/step"),
    ("Memory", r"memory.*"),
    ("Gradient norm by module", r"grad_norm/.*"),
    ("Time by stage", r"seconds/.*"),
    ("More", r".*"),
)
_FOLDED = ("Gradient norm by module", "Time by stage", "More")
_NOT_DRAWN = re.compile(r"step|images|epoch|alarm/.*")
_WORDS = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images/s",
    "data_wait": "share of the time spent waiting for data",
    "gpu_utilization": "GPU utilisation, 0 to 1",
    "memory_gib": "memory, GiB",
    "memory_growth_gib": "memory growth, GiB",
    "seconds/step": "seconds a step",
    "rejected": "rejected samples",
}
# Of the record of an evaluation.
_SCORES = ("top1", "top5", "loss")
_HOW = ("k", "temperature", "input", "lr", "image_size", "crop_fraction", "precision", "train", "val", "date")
_LOGARITHMIC = re.compile(r"grad_norm(/.*)?")


def write_report(
    out: Path, run_dirs: Sequence[Path], *, samples: int = 4, pictures: Sequence[Path] = ()
) -> list[RunRecord]:
    """Write the page.

    Args:
        samples: of each run's last batch that are shown as pictures; 0: none.
        pictures: image files that are shown too, such as those of `scaler show features`.

    Returns:
        What was read of the runs.

    Raises:
        ValueError: no such directory, more runs than a page can compare, a picture that is none.
    """
    if not 1 <= len(run_dirs) <= _MOST_RUNS:
        raise ValueError(f"a report compares 1 to {_MOST_RUNS} runs, not {len(run_dirs)}; write several")
    given = [(path.name, _embedded(path)) for path in pictures]
    runs = read_runs(list(run_dirs))
    out.write_text(page(runs, batches=[_batch_picture(run, samples) for run in runs] if samples else [], given=given))
    return runs


def page(runs: list[RunRecord], *, batches: Sequence[str], given: Sequence[tuple[str, str]]) -> str:
    """The HTML of a report.

    Args:
        batches: for each run the HTML of a picture of a batch, or why there is none; empty: leave that section out.
        given: names and data URLs of further pictures.
    """
    panels: list[dict[str, Any]] = []
    sections = []
    for title, body in _curves(runs, panels):
        sections.append(_folded(title, body) if title in _FOLDED else f"<h2>{title}</h2>{body}")
    sections += [
        f"<h2>{title}</h2>{body}"
        for title, body in (
            ("Recipes", _recipes(runs)),
            ("Evaluations", _evaluations(runs)),
            ("Rejected samples", _rejected(runs)),
            ("Machine and software", _environment(runs)),
            ("Pictures", _pictures(runs, batches, given)),
        )
        if body
    ]
    data = {"runs": [{"name": run.name, "axis": _axis(run)} for run in runs], "panels": panels}
    style, script = (resources.files("scaler.show").joinpath(f"report.{kind}").read_text() for kind in ("css", "js"))
    chips = "".join(
        f'<button class="chip" aria-pressed="true" data-run="{number}" title="show or hide">{_sample(number)}'
        f"{html.escape(run.name)}</button>"
        for number, run in enumerate(runs)
    )
    now = datetime.datetime.now(datetime.UTC)
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return f"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)} · scaler</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1>
<p class="faint">written {now:%Y-%m-%d %H:%M} UTC by scaler {metadata.version("scaler")}</p></header>
<nav aria-label="curves">
{chips}
<label>x axis <select id="axis"><option>step<option>images<option>epoch</select></label>
<label>smooth <input id="smooth" type="range" min="0" max="3" step="0.25" value="0"></label>
<button id="reset" hidden>whole run</button>
<button id="theme">light / dark</button>
<span class="faint">hover: values · drag: zoom · double click: whole run</span>
</nav>
<main>
<noscript><p class="bad">A script in this page draws the curves, and scripts are switched off here.</p></noscript>
<h2>Runs</h2>
{_overview(runs)}
{_problems(runs)}
{"".join(sections)}
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>
{script}</script>
</body>
</html>
"""


# ---------------------------------------------------------------------- curves


def _curves(runs: list[RunRecord], panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Sections of plots by title; what they draw is appended to `panels`."""
    names = [name for run in runs for name in run.columns if not _NOT_DRAWN.fullmatch(name)]
    names = list(dict.fromkeys(names))
    if not names:
        yield "Curves", "<p>None of these runs has logged a step yet (track.log_every says how often they do).</p>"
        return
    for title, pattern in GROUPS:
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        names = [name for name in names if name not in chosen]
        figures = [_figure(_panel(name, runs), panels) for name in chosen]
        if figures:
            yield title, f'<div class="panels">{"".join(figures)}</div>'
        if title == "Loss":
            yield "Alarms", _alarms(runs, panels)


def _panel(name: str, runs: list[RunRecord]) -> dict[str, Any]:
    """One metric of all runs that have it: its points, thinned, and the steps at which it was not finite."""
    series = []
    for number, run in enumerate(runs):
        steps, values = run.series(name)
        kept = thinned(values, most=_MOST_POINTS)
        steps, values = steps[kept], values[kept]
        if not len(values):
            continue
        finite = np.isfinite(values)
        numbers = [float(f"{value:.6g}") if ok else None for value, ok in zip(values.tolist(), finite, strict=True)]
        series.append({"run": number, "step": _ints(steps), "value": numbers, "bad": _ints(steps[~finite])})
    return {"name": name, "log": bool(_LOGARITHMIC.fullmatch(name)), "series": series}


def _figure(panel: dict[str, Any], panels: list[dict[str, Any]]) -> str:
    name = panel["name"]
    panels.append(panel)
    words = _WORDS.get(name, name)
    label = f"{words}: {len(panel['series'])} runs over the steps of the training"
    return (
        f'<figure class="panel"><figcaption><b>{html.escape(words)}</b>'
        '<button title="logarithmic axis">log</button></figcaption>'
        f'<div class="plot" role="img" aria-label="{html.escape(label)}" data-panel="{len(panels) - 1}"></div>'
        '<div class="tip" hidden></div></figure>'
    )


def _alarms(runs: list[RunRecord], panels: list[dict[str, Any]]) -> str:
    """A bar for each stretch of steps in which a sign of a collapse was seen."""
    strips = []
    for number, run in enumerate(runs):
        for name in sorted(name for name in run.columns if name.startswith("alarm/")):
            steps = run.columns["step"]
            on = np.nan_to_num(run.columns[name], nan=0.0) > 0
            edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(np.int8)))
            spans = [[int(steps[a]), int(steps[b - 1])] for a, b in edges.reshape(-1, 2).tolist()]
            if spans:
                strips.append({"name": name.removeprefix("alarm/"), "run": number, "spans": spans[:_MOST_POINTS]})
    if not strips:
        rows = sum(len(run.columns.get("step", ())) for run in runs)
        return f"<p>No sign of a collapse in {rows:,} logged rows.</p>"
    panels.append({"name": "alarms", "strips": strips})
    return (
        '<figure class="panel"><div class="plot" role="img" aria-label="alarms over the steps of the training" '
        f'data-panel="{len(panels) - 1}"></div></figure>'
    )


def _axis(run: RunRecord) -> dict[str, list[float]]:
    """Steps, and the images and epochs that they stand for, at the places where these change their slope."""
    if not run.columns:
        return {"step": [0.0, 1.0]}
    steps = run.columns["step"]
    kept = sorted({0, len(steps) - 1, *_bends(steps, run.columns.get("images"))})
    found: dict[str, list[float]] = {"step": steps[kept].tolist()}
    for name in ("images", "epoch"):
        values = run.columns.get(name)
        if values is not None and np.isfinite(values[kept]).all():
            found[name] = values[kept].tolist()
    return found


def _bends(steps: Floats, images: Floats | None) -> list[int]:
    """Rows after which a step has another number of images than before."""
    if images is None or len(steps) < 3:
        return []
    slope = np.diff(images) / np.maximum(np.diff(steps), 1)
    return [int(row) for row in np.flatnonzero(np.abs(np.diff(slope)) > 1e-9) + 1][:_MOST_POINTS]


# ---------------------------------------------------------------------- tables


def _overview(runs: list[RunRecord]) -> str:
    """A row a run: how it stands, how far it is, how good, how fast."""
    columns: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("method", lambda run: str(_at(run.recipe, "method", "name") or "")),
        ("backbone", lambda run: str(_at(run.recipe, "method", "backbone") or "")),
        ("step", _progress),
        ("images", lambda run: _number(run.last("images"), "{:,.0f}")),
        ("epoch", lambda run: _number(run.last("epoch"), "{:.2f}")),
        ("loss", lambda run: _number(run.last("loss"), "{:.4g}")),
        ("best evaluation", _best),
        ("images/s", lambda run: _number(run.typical("images_per_second"), "{:,.0f}")),
        ("data wait", lambda run: _number(run.typical("data_wait"), "{:.0%}")),
        ("GPU in use", lambda run: _number(run.typical("gpu_utilization"), "{:.0%}")),
        ("memory", lambda run: _number(_largest(run, "memory_gib"), "{:.2f} GiB")),
        ("training time", _duration),
        ("rejected", lambda run: _number(run.last("rejected"), "{:,.0f}")),
        ("rows with alarms", _alarm_rows),
    ]
    cells = [[html.escape(words(run)) for _, words in columns] for run in runs]
    used = [number for number in range(len(columns)) if any(row[number] for row in cells)]
    head = "".join(f'<th class="number">{columns[number][0]}</th>' for number in used)
    rows = []
    for number, run in enumerate(runs):
        state = f'<span class="{"bad" if run.failed else ""}">{html.escape(run.state)}</span>'
        facts = "".join(f'<td class="number">{cells[number][column]}</td>' for column in used)
        name = f'<td class="name">{_sample(number)} <b>{html.escape(run.name)}</b></td>'
        path = html.escape(str(run.path))
        rows.append(f'<tr title="{path}">{name}<td class="state">{state}</td>{facts}</tr>')
    methods = {name for run in runs if (name := _at(run.recipe, "method", "name"))}
    note = '<p class="faint">Losses of different methods do not compare.</p>' if len(methods) > 1 else ""
    typical = '<p class="faint">Speed and waiting are medians over the logged rows, memory is the largest.</p>'
    head = f"<tr><th>run</th><th>state</th>{head}</tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>{typical}{note}'


def _problems(runs: list[RunRecord]) -> str:
    lines = [f"<li><b>{html.escape(run.name)}</b>: {html.escape(line)}</li>" for run in runs for line in run.problems]
    return f'<h3 class="bad">What could not be read</h3><ul>{"".join(lines)}</ul>' if lines else ""


def _recipes(runs: list[RunRecord]) -> str:
    """What differs between the recipes, and each of them whole."""
    having = [run for run in runs if run.recipe]
    if not having:
        return ""
    parts = []
    if len(having) > 1:
        flat = {run.name: dict(flatten(run.recipe)) for run in having}
        methods = {recipe.get("method.name") for recipe in flat.values()}
        if len(methods) > 1:  # what only one of the methods knows of would bury the rest
            common = set.intersection(*(set(recipe) for recipe in flat.values()))
            flat = {
                name: {key: value for key, value in recipe.items() if key in common or not key.startswith("method.")}
                for name, recipe in flat.items()
            }
            parts.append('<p class="faint">What differs, without the settings that only one of the methods has.</p>')
        parts.append(_compared(flat, only_different=True) or "<p>The recipes are the same.</p>")
    for run in having:
        lines = "\n".join(f"{key}: {json.dumps(value, default=str)}" for key, value in flatten(run.recipe))
        parts.append(
            f"<details><summary>the whole recipe of {html.escape(run.name)}</summary>"
            f"<pre>{html.escape(lines)}</pre></details>"
        )
    return "".join(parts)


def _environment(runs: list[RunRecord]) -> str:
    """What `run.json` says: what is engaged, memory by part, hardware, versions, the state of the code."""
    facts = {}
    for run in runs:
        report = {key: value for key, value in run.report.items() if key != "memory_bytes_by_rank"}
        memory = report.pop("memory_bytes", None)
        flat = {key.removeprefix("environment."): value for key, value in flatten(report)}
        if isinstance(memory, dict):
            flat |= {f"memory of {part}": f"{size / 2**20:,.1f} MiB" for part, size in memory.items()}
        if flat:
            facts[run.name] = flat
    return _compared(facts, only_different=False)


def _compared(facts: dict[str, dict[str, Any]], *, only_different: bool) -> str:
    """A table with a row a key and a column a run; rows that differ are marked, or are the only ones."""
    keys = list(dict.fromkeys(key for one in facts.values() for key in one))
    rows = []
    for key in keys:
        values = [_exact(one[key]) if key in one else "–" for one in facts.values()]
        differs = len(set(values)) > 1
        if only_different and not differs:
            continue
        mark = ' class="differs"' if differs and not only_different else ""
        cells = "".join(f'<td class="value">{html.escape(value)}</td>' for value in values)
        rows.append(f"<tr{mark}><td><code>{html.escape(key)}</code></td>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in facts)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _evaluations(runs: list[RunRecord]) -> str:
    """What `scaler eval` has written of the runs (`scaler.evals.evaluate`), a row each."""
    rows = []
    for number, run in enumerate(runs):
        for found in run.evaluations:
            scores = ", ".join(f"{name} {_word(found[name])}" for name in _SCORES if found.get(name) is not None)
            how = ", ".join(f"{name} {_word(found[name])}" for name in _HOW if found.get(name) is not None)
            cells = [str(found.get("evaluation", "?")), _word(found.get("step", "")), scores, how]
            words = "".join(f'<td class="value">{html.escape(cell)}</td>' for cell in cells)
            rows.append(f'<tr><td class="name">{_sample(number)} {html.escape(run.name)}</td>{words}</tr>')
    if not rows:
        return ""
    head = "<tr><th>run</th><th>evaluation</th><th>step</th><th>scores</th><th>how</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _rejected(runs: list[RunRecord]) -> str:
    """Samples that could not be decoded: how many, why, and the first of them."""
    parts = []
    for run in runs:
        if not run.rejected:
            continue
        distinct = {row.get("id"): row for row in reversed(run.rejected)}  # as each was met first
        reasons = Counter(str(row.get("reason")) for row in distinct.values())
        why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
        rows = []
        for row in sorted(distinct.values(), key=_met)[:_MOST_SAMPLES]:
            values = (row.get(key, "") for key in ("step", "key", "shard", "reason", "replacement_key"))
            rows.append("<tr>" + "".join(f'<td class="value">{html.escape(str(v))}</td>' for v in values) + "</tr>")
        more = f"<p>… and {len(distinct) - len(rows)} more</p>" if len(distinct) > len(rows) else ""
        head = "<tr><th>step</th><th>sample</th><th>shard</th><th>reason</th><th>replaced by</th></tr>"
        parts.append(
            f"<h3>{html.escape(run.name)}: {len(distinct)} samples, met {len(run.rejected)} times</h3>"
            f'<p>{html.escape(why)}</p><div class="wide"><table>{head}{"".join(rows)}</table></div>{more}'
        )
    if not parts and any(run.columns for run in runs):
        return "<p>None: every sample could be decoded.</p>"
    return "".join(parts)


# ---------------------------------------------------------------------- pictures


def _pictures(runs: list[RunRecord], batches: Sequence[str], given: Sequence[tuple[str, str]]) -> str:
    parts = [
        f"<figure><figcaption>{_sample(number)} <b>{html.escape(run.name)}</b></figcaption>{picture}</figure>"
        for number, (run, picture) in enumerate(zip(runs, batches, strict=False))
    ]
    for name, url in given:
        words = html.escape(name)
        parts.append(f'<figure><figcaption><b>{words}</b></figcaption><img alt="{words}" src="{url}"></figure>')
    return f'<div class="pictures">{"".join(parts)}</div>' if parts else ""


def _batch_picture(run: RunRecord, samples: int) -> str:
    """A contact sheet of the last logged batch as the network got it, or why there is none."""
    from scaler.batches import run_batch
    from scaler.show.views import contact_sheet

    step = int(run.last("step") or 1)
    try:
        sheet = contact_sheet(run_batch(run.path, step=step), limit=samples, augmented=True)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"<p>No picture of its batches: {html.escape(reason)}</p>"
    stream = io.BytesIO()
    sheet.save(stream, "webp", quality=90)
    alt = f"samples of step {step} of {run.name} as the network got them"
    return f'<img alt="{html.escape(alt)}" src="{_url(stream.getvalue(), "webp")}">'


def _embedded(path: Path) -> str:
    """A picture file as a data URL.

    Raises:
        ValueError: it cannot be read, or is no picture that browsers show.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            kind = str(image.format).lower()
    except OSError as error:
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"{path} is no PNG, JPEG or WebP picture") from None
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    return _url(content, kind)


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------------- words


def _sample(run: int) -> str:
    """A run's line as the curves draw it."""
    dash = ' stroke-dasharray="6 3"' if run >= 4 else ""
    line = f'<line x1="0" x2="26" y1="5" y2="5" stroke="var(--run{run})" stroke-width="3"{dash}/>'
    return f'<svg class="line" aria-hidden="true" viewBox="0 0 26 10">{line}</svg>'


def _folded(title: str, body: str) -> str:
    return f"<details><summary><b>{title}</b></summary>{body}</details>"


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _ints(values: Floats) -> list[int]:
    return [int(value) for value in values.tolist()]


def _at(values: dict[str, Any], *keys: str) -> Any:
    """A value of nested mappings; None where there is none."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _met(row: dict[str, Any]) -> int:
    """The step that met a rejected sample."""
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _progress(run: RunRecord) -> str:
    """How far the run is, of how much."""
    step, total = run.last("step"), str(_at(run.recipe, "schedule", "total") or "?")
    return "" if step is None else f"{step:,.0f} of {total.removesuffix(' steps')}"


def _best(run: RunRecord) -> str:
    scores = {name: run.best[f"val/{name}"] for name in _SCORES if f"val/{name}" in run.best}
    words = ", ".join(f"{name} {_word(value)}" for name, value in scores.items())
    return f"{words} (step {run.best.get('step')})" if scores else ""


def _largest(run: RunRecord, name: str) -> float | None:
    values = run.series(name)[1]
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _duration(run: RunRecord) -> str:
    """The time that the logged steps took."""
    steps, seconds = run.series("seconds/step")
    finite = np.isfinite(seconds)
    if not finite.any():
        return ""
    total = float((np.diff(steps[finite], prepend=0) * seconds[finite]).sum())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if total >= 1.5 * length:
            return f"{total / length:.1f} {unit}"
    return f"{math.ceil(total)} s"


def _alarm_rows(run: RunRecord) -> str:
    names = [name for name in run.columns if name.startswith("alarm/")]
    rows = np.zeros(len(run.columns.get("step", ())), dtype=bool)
    for name in names:
        rows |= np.nan_to_num(run.columns[name], nan=0.0) > 0
    return f"{int(rows.sum()):,}" if rows.any() else ""
