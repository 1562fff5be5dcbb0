"""What a person sees of a run: a live bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import datetime
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_REFRESH = 0.1  # seconds between redraws


class ProgressLine:
    """Progress of a run of `total_steps` that starts after `start_step`.

    The bar is drawn by the caller's thread only: a drawing thread could hold a lock at the moment in which loader
    processes are forked.
    """

    def __init__(self, console: Console, *, start_step: int, total_steps: int) -> None:
        self.console, self.total_steps = console, total_steps
        self._marks: deque[tuple[float, int]] = deque([(time.perf_counter(), start_step)], maxlen=64)
        self._text = ""
        self._drawn = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, console=console, auto_refresh=False)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="starting")

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Move to `step`; a `row` that is not empty renews the figures, as one printed line where there is no bar."""
        now = time.perf_counter()
        self._marks.append((now, step))
        if row:
            self._text = describe(row)
        eta = f"ETA {self._eta()}"
        if self._bar is None:
            if row:
                self.note(f"step {step}/{self.total_steps}  {self._text}  {eta}")
            return
        if not self._bar.live.is_started:
            self._bar.start()
        self._bar.update(self._task, completed=step, text=f"{self._text}  {eta}".strip())
        if now - self._drawn >= _REFRESH or step >= self.total_steps:
            self._bar.refresh()
            self._drawn = now

    def note(self, text: str) -> None:
        """Print `text` as it is, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.refresh()
            self._bar.stop()

    def _eta(self) -> str:
        """Time left at the speed of the latest steps."""
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step <= first_step:
            return "?"
        seconds = (last_time - first_time) / (last_step - first_step) * max(self.total_steps - last_step, 0)
        return str(datetime.timedelta(seconds=round(seconds)))


def describe(row: dict[str, Any]) -> str:
    """The figures of a metrics row that a person wants at a glance, in one line."""
    forms = (
        ("epoch", "epoch {:.2f}"),
        ("loss", "loss {:.4f}"),
        ("val/top1", "top-1 {:.1%}"),
        ("lr", "lr {:.2e}"),
        ("images_per_second", "{:.0f} images/s"),
        ("data_wait", "data wait {:.0%}"),
        ("gpu_utilization", "GPU {:.0%}"),
        ("memory_gib", "{:.1f} GiB"),
    )
    parts = [form.format(row[key]) for key, form in forms if isinstance(row.get(key), int | float)]
    if "loss" in row and row["loss"] is None:
        parts.insert(0, "loss not finite")
    return "  ".join(parts)
