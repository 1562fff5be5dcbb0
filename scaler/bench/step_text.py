"""What `scaler bench step` has measured, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from scaler.bench import trace
from scaler.bench.parts import NAMES


def as_table(result: Mapping[str, Any]) -> Group:
    """A row a contender and variant, then a column each with its time by part."""
    s = result["recipe"]["method"]
    where = result["device"] if result["device"] != "cpu" else f"cpu, {result['threads']} threads"
    ranks = f"{result['ranks']} rank{'s' if result['ranks'] > 1 else ''}"
    settings, varied = result["recipe"]["strategy"], result["rows"][0]["variant"]
    same = " ".join(settings[key] for key in ("name", "precision") if f"strategy.{key}" not in varied)
    title = f"{s['name']}, {s['backbone']}, {same}, {ranks} on {where}, {result['data']} data"
    steps, parts = Table(title=title, title_justify="left"), Table(title="ms by part (medians)", title_justify="left")
    steps.add_column("\n".join([f"{key}," for key in varied] + ["step"]), overflow="fold")
    parts.add_column("part")
    for column in ("ms", "images/s", "MFU", "all rows", "peak GB", "warm-up s"):
        steps.add_column(column, justify="right")
    measured = []
    for number, row in enumerate(result["rows"], start=1):
        name = f"{number}: " + ", ".join([*row["variant"].values(), row["name"]])
        if "failed" in row:
            steps.add_row(name, "failed", style="dim")
            continue
        low, high = row["middle_half_seconds"]
        steps.add_row(
            name,
            f"{1000 * row['step_seconds']:,.1f} ±{500 * (high - low):,.1f}",
            f"{row['images_per_second']:,.1f}",
            f"{100 * row['mfu']:.1f} %",
            f"{100 * row['mfu_all_rows']:.1f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.2f}",
            f"{row['warm_up_seconds']:.1f}",
        )
        parts.add_column(str(number), justify="right")
        measured.append(row["parts"])
    for part in NAMES.values():
        parts.add_row(part, *(f"{1000 * row[part]:,.1f}" if part in row else "" for row in measured))
    return Group(steps, parts)


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What it means in words."""
    rates = [row["matmul_flops"] for row in result["rows"] if "matmul_flops" in row]
    precision = result["recipe"]["strategy"]["precision"]
    yield (
        f"MFU: of {max(rates) / 1e12:,.2f} TFLOP/s, this machine's own rate in large matrix products ({precision}); "
        "all rows: as if those that drop path skips were computed too, which is how published figures count"
    )
    for number, row in enumerate(result["rows"], start=1):
        if "failed" in row:
            yield f"{number}, {row['name']}: {row['failed']}"
        if "ours_times_as_fast" in row:
            share = row["our_share_of_memory"]
            memory = "" if share is None else f", {100 * share:.0f} % of its memory"
            cpu = f" ({row['in_processor_time']:.2f} in processor time)" if "in_processor_time" in row else ""
            yield f"ours, against {number}, {row['name']}: {row['ours_times_as_fast']:.2f} times as fast{cpu}{memory}"
        if row.get("made_of"):
            yield f"{number}, {row['name']}: {row['made_of']}"
        if "profile" in row:
            yield from trace.as_lines(row["profile"], file=row["trace"])
