"""TensorBoard and Weights & Biases behind one small interface; both are imported only when the recipe asks for them."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from scaler.recipe import Track


class Tracker(Protocol):
    """Receives the numbers of every logged row."""

    def log(self, step: int, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(run_dir: Path, *, start_step: int, track: Track, recipe: dict[str, Any]) -> list[Tracker]:
    """The trackers that the recipe's `track` section asks for.

    Raises:
        ValueError: one of them is not installed or cannot start.
    """
    trackers: list[Tracker] = []
    if track.tensorboard:
        trackers.append(TensorBoard(run_dir, start_step=start_step))
    if track.wandb != "disabled":
        mode, project = track.wandb, track.wandb_project
        trackers.append(WeightsAndBiases(run_dir, start_step=start_step, mode=mode, project=project, recipe=recipe))
    return trackers


class TensorBoard:
    """Event files in `RUN/tensorboard`; on resume the events after the checkpoint are marked as void."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"track.tensorboard is true, but tensorboard cannot be imported ({error}): pip install tensorboard, "
                "or set track.tensorboard=false"
            ) from None
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, row: dict[str, Any]) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run directory: its id is kept in `RUN/wandb_id.txt`, so that a resumed run continues it.

    Rows carry their step as a value and charts use it as the axis: W&B's own counter only goes up and would drop the
    rows between the checkpoint and the crash when they are computed again.
    """

    def __init__(self, run_dir: Path, *, start_step: int, mode: str, project: str, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"track.wandb is {mode}, but wandb cannot be imported ({error}): pip install wandb, or set "
                "track.wandb=disabled"
            ) from None
        id_file = run_dir / "wandb_id.txt"
        if start_step == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run: Any = wandb.init(
                project=project,
                name=run_dir.name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,
                mode="online" if mode == "online" else "offline",
                dir=str(run_dir),
                config=without_credentials(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ValueError(
                f"track.wandb is {mode}, but W&B did not start ({error}): run `wandb login` first, or set "
                "track.wandb=offline and upload later with `wandb sync`"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: dict[str, Any]) -> None:
        self._run.log({**_numbers(row), "step": step})

    def close(self) -> None:
        self._run.finish()


def without_credentials(value: Any) -> Any:
    """A copy of nested settings in which URLs have lost their user, password and query (where signatures sit)."""
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return re.sub(r"(\w+://)(?:[^/@\s]*@)?([^?\s]*)(\?\S*)?", r"\1\2", value)
    return value


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
