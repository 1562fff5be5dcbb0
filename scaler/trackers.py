"""TensorBoard, Weights & Biases and MLflow, through Accelerate's trackers; each is imported only when it is asked for.

A run that goes on after a stop goes on in the trackers too: its W&B and MLflow ids are kept in the run directory, and
TensorBoard marks what came after the checkpoint as void.
"""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from scaler.nested import flatten, without_credentials

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from scaler.recipe import Track

_LONGEST_PARAMETER = 500  # characters, of those that older MLflow servers take


class Tracker(Protocol):
    """Receives the numbers of every logged row."""

    def log(self, step: int, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    run_dir: Path, *, start_step: int, track: Track, recipe: dict[str, Any], environment: dict[str, Any]
) -> list[Tracker]:
    """The trackers that the recipe's `track` section asks for; called by one process only.

    Args:
        recipe: the resolved recipe, and
        environment: `scaler.environment.environment()`, for trackers that show them.

    Raises:
        ValueError: one of them is not installed or cannot start.
    """
    recipe, trackers = without_credentials(recipe), list[Tracker]()
    if track.tensorboard:
        trackers.append(TensorBoard(run_dir, start_step=start_step, recipe=recipe))
    if track.wandb != "disabled":
        trackers.append(WeightsAndBiases(run_dir, start_step=start_step, track=track, recipe=recipe))
    if track.mlflow:
        tags = {f"scaler.{key}": str(value) for key, value in flatten(environment)}
        trackers.append(MLflow(run_dir, start_step=start_step, track=track, recipe=recipe, tags=tags))
    return trackers


def _started(tracker: GeneralTracker) -> GeneralTracker:
    """Start a tracker of Accelerate's in this process, which alone has it."""
    from accelerate import PartialState

    # Accelerate's logger wants its state to exist. On "the CPU" that is all it does: it picks and sets no device, and
    # finds the process group that we have made.
    PartialState(cpu=True)
    tracker.main_process_only = False
    tracker.start()
    return tracker


class TensorBoard:
    """Event files in `RUN/tensorboard`; on resume the events after the checkpoint are marked as void."""

    def __init__(self, run_dir: Path, *, start_step: int, recipe: dict[str, Any]) -> None:
        try:
            import tensorboard
            from accelerate.tracking import TensorBoardTracker
        except ImportError as error:
            raise ValueError(
                f"track.tensorboard is true, but tensorboard cannot be imported ({error}): pip install tensorboard, "
                "or set track.tensorboard=false"
            ) from None
        del tensorboard  # Accelerate would only say that it has no such tracker
        self._tracker: Any = _started(TensorBoardTracker("tensorboard", str(run_dir), purge_step=start_step + 1))
        if start_step == 0:
            text = yaml.safe_dump(recipe, sort_keys=False, width=100)
            self._tracker.tracker.add_text("recipe", f"```yaml\n{text}```", global_step=0)

    def log(self, step: int, row: dict[str, Any]) -> None:
        self._tracker.log(_numbers(row), step=step)

    def close(self) -> None:
        self._tracker.finish()


class WeightsAndBiases:
    """One W&B run per run directory: its id is kept in `RUN/wandb_id.txt`, so that a resumed run continues it.

    Rows carry their step as a value and charts use it as the axis: W&B's own counter only goes up and would drop the
    rows between the checkpoint and the crash when they are computed again.
    """

    def __init__(self, run_dir: Path, *, start_step: int, track: Track, recipe: dict[str, Any]) -> None:
        try:
            import wandb
            from accelerate.tracking import WandBTracker
        except ImportError as error:
            raise ValueError(
                f"track.wandb is {track.wandb}, but wandb cannot be imported ({error}): pip install wandb, or set "
                "track.wandb=disabled"
            ) from None
        try:
            self._tracker: Any = _started(
                WandBTracker(
                    track.wandb_project,
                    name=run_dir.name,
                    # The agent of a sweep has given this run its id already.
                    id=_kept_id(run_dir / "wandb_id.txt", fresh=start_step == 0, given=os.environ.get("WANDB_RUN_ID")),
                    resume="allow" if track.wandb == "online" else None,
                    mode=track.wandb,
                    dir=str(run_dir),
                    config=recipe,
                    settings=wandb.Settings(silent=True, console="off"),
                )
            )
        except wandb.Error as error:
            raise ValueError(
                f"track.wandb is {track.wandb}, but W&B did not start ({error}): run `wandb login` first, or set "
                "track.wandb=offline and upload later with `wandb sync`"
            ) from None
        self._tracker.tracker.define_metric("*", step_metric="step")

    def log(self, step: int, row: dict[str, Any]) -> None:
        self._tracker.log({**_numbers(row), "step": step})

    def close(self) -> None:
        self._tracker.finish()


class MLflow:
    """One MLflow run per run directory: its id is kept in `RUN/mlflow_id.txt`, so that a resumed run continues it.

    It goes where MLFLOW_TRACKING_URI says, otherwise to `mlflow.db` beside the run directory, which all runs there
    share. Rows are sent in the background. Those between a checkpoint and a crash are in it twice, since MLflow takes
    nothing back.
    """

    def __init__(
        self, run_dir: Path, *, start_step: int, track: Track, recipe: dict[str, Any], tags: dict[str, str]
    ) -> None:
        try:
            import mlflow
            from accelerate.tracking import MLflowTracker
        except ImportError as error:
            raise ValueError(
                f"track.mlflow is true, but mlflow cannot be imported ({error}): pip install 'scaler[mlflow]', or set "
                "track.mlflow=false"
            ) from None
        place = run_dir.resolve().parent
        ours = f"sqlite:///{place / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", ours)
        mlflow.set_tracking_uri(uri)
        id_file = run_dir / "mlflow_id.txt"
        resumed = start_step > 0 and id_file.exists()
        try:
            self._tracker: Any = _started(
                MLflowTracker(
                    track.mlflow_experiment,
                    logging_dir=(place / "mlflow").as_uri() if uri == ours else None,
                    run_id=id_file.read_text().strip() if resumed else None,
                    run_name=run_dir.name,
                )
            )
            mlflow.set_tags(tags)
            if not resumed:
                id_file.write_text(self._tracker.tracker.info.run_id + "\n")
                values = {key: str(value) for key, value in flatten(recipe)}
                self._tracker.store_init_configuration(
                    {key: value for key, value in values.items() if len(value) <= _LONGEST_PARAMETER}
                )
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(
                f"track.mlflow is true, but MLflow did not start ({str(error).splitlines()[0]}): see "
                "MLFLOW_TRACKING_URI and `mlflow server`, or set track.mlflow=false"
            ) from None

    def log(self, step: int, row: dict[str, Any]) -> None:
        self._tracker.log(_numbers(row), step=step, synchronous=False)

    def close(self) -> None:
        import mlflow

        try:
            mlflow.flush_async_logging()
            self._tracker.finish()
        except mlflow.exceptions.MlflowException as error:  # the training is done all the same, and metrics.jsonl whole
            warnings.warn(f"MLflow did not take all rows: {str(error).splitlines()[0]}", stacklevel=2)


def _kept_id(path: Path, *, fresh: bool, given: str | None) -> str:
    """The id that `path` keeps; a fresh run gets the one that is given, or a new one."""
    if fresh or not path.exists():
        path.write_text((given or secrets.token_hex(4)) + "\n")
    return path.read_text().strip()


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
