"""From Python: the shipped notebook in a real kernel, its stop button pressed; runs that are looked at."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import scaler
from scaler.checkpoint import complete_checkpoints
from tests.images import make_image_folder
from tests.long import LONG, only_long

NOTEBOOK = Path(__file__).parents[2] / "launch" / "notebook" / "first_run.ipynb"
STEPS = 100 if LONG else 20  # with the stop button in between
SETTINGS = {
    "schedule.total": f"{STEPS} steps",
    "data.global_batch_size": 24,
    "data.num_workers": 0,
    "track.wandb": "disabled",
}


def until(condition: Any, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The shipped notebook's folder, and what each of its cells showed, by the first line of its source.

    With SCALER_TEST_LONG=1 on the digits; its training is interrupted by the stop button, and the cell run once more.
    """
    folder = tmp_path_factory.mktemp("notebook")
    images = folder / "images"
    for part, count, seed in () if LONG else (("train", 90, 1), ("val", 30, 2)):
        make_image_folder(images / part, num_images=count, classes=3, size=32, format="png", seed=seed)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f"\nfolder, images, settings = Path({str(folder)!r}), Path({str(images)!r}), {SETTINGS}"
    rows = folder / "run" / "metrics.jsonl"
    shown: dict[str, list[Any]] = {}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():

        def press_stop() -> None:
            until(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3)
            asyncio.run(client.km.interrupt_kernel())

        for number, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            if LONG and "scaler.train" in cell.source:
                thread = threading.Thread(target=press_stop)
                thread.start()
                client.execute_cell(cell, number)
                thread.join()
                shown["interrupted"] = list(cell.outputs)
                shutil.copytree(folder / "run" / "checkpoints", folder / "then")
            client.execute_cell(cell, number)
            shown[cell.source.splitlines()[0]] = list(cell.outputs)
    return folder, shown


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_holds_no_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


@only_long
def test_the_stop_button_saves_and_the_cell_goes_on(executed: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, shown = executed
    stopped = printed(shown["interrupted"])
    step = int(re.search(r"stopped after a checkpoint, at step (\d+)", stopped)[1])  # type: ignore[index]
    assert 3 <= step < STEPS and "Traceback" not in stopped
    assert complete_checkpoints(folder / "then")[0].name == f"step-{step:08d}"
    assert f"resuming from {folder}" in printed(shown["run = scaler.train("])


def test_the_notebook_trains_and_shows(executed: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, shown = executed
    told = printed(shown["run = scaler.train("])
    assert f"done: step {STEPS}" in told and f"step {STEPS}/" not in told and "\x1b" not in told
    (bar,) = [o.data["text/html"] for o in shown["run = scaler.train("] if o.output_type == "display_data"]
    assert f'<progress value="{STEPS}" max="{STEPS}"' in bar and "loss" in bar, "one bar that moved to the end"
    (table,) = [o.data["text/html"] for o in shown["run = scaler.train("] if o.output_type == "execute_result"]
    assert str(folder / "run") in table and "done" in table
    for first_line in ("run.plot()", "run.sheet(1, limit=4, augmented=True)", "run.embedding(val, crop_fraction=1.0)"):
        (result,) = [output for output in shown[first_line] if output.output_type == "execute_result"]
        assert len(result.data["image/png"]) > 3000, first_line
    (scores,) = [o for o in shown["from shards.index import ShardIndex"] if o.output_type == "execute_result"]
    top1 = {name: float(value) for name, value in re.findall(r"'([\w ]+)': ([\d.]+)", scores.data["text/plain"])}
    assert set(top1) == {"as initialised", "trained"}
    assert (folder / "exported" / "model.safetensors").is_file()


def test_a_run_is_looked_at(executed: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, _ = executed
    run = scaler.Run(folder / "run")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics["step"].tolist() == list(range(1, STEPS + 1))
    assert run.metrics["loss"].tolist() == [row["loss"] for row in rows]
    assert run.state == "done" and repr(run) == f"Run({str(folder / 'run')!r}): done"
    assert run.recipe.schedule.total == f"{STEPS} steps"
    assert [axes.get_title() for axes in run.plot("loss", "grad_norm").axes] == ["loss", "grad_norm"]
    assert np.asarray(run.sheet(2, limit=2)).std() > 10
    features, labels = run.features(folder / "images" / "val")  # a folder of images as it is
    assert features.shape == (len(labels), 64) and set(labels.tolist()) == set(range(3 if not LONG else 10))
    saved = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder / "run" / "checkpoints")]
    assert [run.model(step).step for step in saved] == saved

    with pytest.raises(ValueError, match=f"has no checkpoint of step 7000; it has {min(saved)}"):
        run.model(7000)
    with pytest.raises(ValueError, match=r"has no column 'los'; it has step, images"):
        run.plot("los")
    with pytest.raises(ValueError, match=r"is no run directory: it holds no recipe.yaml"):
        scaler.Run(folder)


def test_what_is_wrong_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'optim.lrr'; did you mean 'lr'"):
        scaler.train("simclr/demo", shards=tmp_path, dir=tmp_path / "run", **{"optim.lrr": 1})
    with pytest.raises(ValueError, match="no recipe 'simclr/dem'"):
        scaler.train("simclr/dem")
    with pytest.raises(ValueError, match="index"):
        scaler.train("simclr/demo", shards=tmp_path, dir=tmp_path / "run")


@only_long
def test_why_a_training_ended_is_a_value_error(
    executed: tuple[Path, dict[str, list[Any]]], tmp_path: Path, capfd: Any
) -> None:
    options = {"shards": executed[0] / "shards" / "train", "dir": tmp_path / "run"}
    bad = {"data.global_batch_size": 7, "strategy.micro_batch_size": 2}
    for processes in (1, 2):
        with pytest.raises(ValueError, match="nearest valid choices: a global batch of"):
            scaler.train("simclr/demo", processes=processes, **options, **bad)  # type: ignore[operator]
    assert "Traceback" not in capfd.readouterr().out


def test_import_is_instant_and_the_module_is_still_one() -> None:
    code = (
        "import sys, scaler\n"
        "assert not {'torch', 'numpy', 'timm', 'matplotlib', 'pydantic', 'scaler.train'} & set(sys.modules)\n"
        "assert {'Run', 'load', 'train'} <= set(dir(scaler))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    module = importlib.import_module("scaler.train")
    assert scaler.train is module and isinstance(module, ModuleType) and callable(module) and callable(module.main)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = scaler.trian
