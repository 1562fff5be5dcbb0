"""The entry point: what a run leaves, and one-line errors for everything that does not fit together."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scaler.checkpoint import complete_checkpoints
from scaler.collectives import World
from scaler.methods.simclr.method import SimCLR
from scaler.recipe import load_recipe
from scaler.timetable import Timetable
from scaler.train import build_method, main
from shards import resize
from tests.runs import METHODS, make_shards, rows, weights, write_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """A recipe whose run of 4 steps is done."""
    recipe = write_recipe(tmp_path_factory.mktemp("run") / "run.yaml", "simclr", shards=shards)
    assert main([str(recipe), "schedule.total=4 steps", "data.global_batch_size=24"]) == 0
    return recipe


def fails(capfd, arguments: list[str], *, code: int = 1) -> str:
    """The error line of a failing start."""
    capfd.readouterr()
    assert main(arguments) == code
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_a_run_directory_holds_what_it_should(finished, shards):
    run_dir = finished.with_suffix("")
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert Path(recipe["data"]["shards"]).is_absolute() and recipe["strategy"]["name"] == "ddp"
    assert recipe["optim"]["betas"] == [0.9, 0.999] and recipe["schedule"]["total"] == "4 steps"
    assert load_recipe(str(run_dir / "recipe.yaml")).data.global_batch_size == 24
    table = rows(run_dir)
    assert [row["step"] for row in table] == [1, 2, 3, 4] and [row["images"] for row in table] == [24, 48, 72, 96]
    wanted = {
        "epoch",
        "loss",
        "loss/ntxent",
        "lr",
        "weight_decay",
        "grad_norm",
        "rejected",
        "accuracy",
        "embedding_std",
    }
    assert wanted <= table[0].keys()
    assert json.loads((run_dir / "exit.json").read_text()) == {
        "reason": "done",
        "requeue": False,
        "step": 4,
        "images": 96,
    }
    assert (run_dir / "rejected.jsonl").read_bytes() == b""
    engaged = json.loads((run_dir / "run.json").read_text())
    assert (engaged["strategy"], engaged["weights"], engaged["optimizer_state"]) == ("ddp", "float32", "float32")
    assert engaged["views_cut_by"] == ("torch" if resize._kernel is None else "kernel")
    memory = engaged["memory_bytes"]
    assert memory["parameters"] == memory["gradients"] == 4 * engaged["parameters"] and memory["teacher"] == 0
    assert memory["optimizer"] >= 8 * engaged["parameters"] and memory["activations"] > 0
    assert engaged["memory_bytes_by_rank"] == [memory]
    assert torch.__version__.startswith(engaged["environment"]["packages"]["torch"])
    assert [p.name for p in complete_checkpoints(run_dir / "checkpoints")] == ["step-00000004"]


def test_starting_a_finished_run_again_changes_nothing(finished):
    run_dir = finished.with_suffix("")
    before = (run_dir / "metrics.jsonl").read_bytes(), weights(run_dir / "checkpoints" / "step-00000004")
    assert main([str(finished), "schedule.total=4 steps", "data.global_batch_size=24"]) == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before[0]
    assert all(v.equal(before[1][k]) for k, v in weights(run_dir / "checkpoints" / "step-00000004").items())


def test_stop_after_is_a_pause_of_the_whole_run(shards, tmp_path):
    whole = write_recipe(tmp_path / "whole.yaml", "dinov2", shards=shards)
    parts = write_recipe(tmp_path / "parts.yaml", "dinov2", shards=shards)
    short = ["schedule.total=6 steps", "data.global_batch_size=24"]
    assert main([str(whole), *short]) == 0
    for stop in ("2 steps", "100 images", "6 steps"):
        assert main([str(parts), *short, f"run.stop_after={stop}"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "exit.json").read_text())["reason"] == "done"


@pytest.mark.parametrize("method", list(METHODS))
def test_initial_weights_depend_on_the_seed_alone(shards, tmp_path, method):
    path = str(write_recipe(tmp_path / "run.yaml", method, shards=shards))
    states = [
        build_method(load_recipe(path, overrides=[f"run.seed={seed}"]), world=World()).state_dict()
        for seed in (3, 3, 4)
    ]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert any(not states[0][name].equal(states[2][name]) for name in states[0])


def test_hyper_values_of_vitl_by_hand():
    """ViT-L/16, batch 2,048, "epochs" of 1,250 steps as published; our epochs are of the real data set."""
    recipe = load_recipe("dinov2/vitl16_in1k", overrides=["data.shards=x"])
    method = type(build_method(load_recipe("dinov2/demo", overrides=["data.shards=x"]), world=World()))
    timetable = Timetable(recipe, num_samples=1_281_167)
    stub = method.__new__(method)
    object.__setattr__(stub, "settings", recipe.method)
    at = {step: timetable.hyper(stub, step) for step in (0, 12_499, 68_750, 125_000)}
    assert timetable.total == 125_000
    assert at[0]["lr"] == 0.0 and at[0]["last_layer_lr"] == 0.0
    assert at[12_499]["lr"] == pytest.approx(0.004 * 2**0.5) == at[12_499]["last_layer_lr"]
    assert at[68_750]["lr"] == pytest.approx((0.004 * 2**0.5 + 1e-6) / 2)
    assert at[125_000]["lr"] == pytest.approx(1e-6)
    assert at[0]["weight_decay"] == pytest.approx(0.04) and at[125_000]["weight_decay"] == pytest.approx(0.4)
    assert at[0]["momentum"] == pytest.approx(0.992) and at[125_000]["momentum"] == 1.0
    assert at[0]["teacher_temperature"] == 0.04 and at[68_750]["teacher_temperature"] == 0.07


def test_wrong_use(capfd, finished):
    assert "did you mean 'global_batch_size'" in fails(capfd, [str(finished), "data.global_batch=3"], code=2)
    assert "no recipe" in fails(capfd, ["simclr/nothing_like_it"], code=2)
    assert main([]) == 2


def test_data_that_do_not_fit(capfd, finished, shards, tmp_path):
    new = f"run.dir={tmp_path / 'new'}"
    assert "make shards with `scaler convert" in fails(
        capfd, [str(finished), new, f"data.shards={tmp_path / 'nowhere'}"]
    )
    assert "nearest valid choices" in fails(capfd, [str(finished), new, "strategy.micro_batch_size=7"])
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in shards.iterdir():
        (cut / path.name).write_bytes(path.read_bytes())
    for path in cut.glob("*.tar"):
        os.truncate(path, path.stat().st_size // 2)
    error = fails(capfd, [str(finished), new, f"data.shards={cut}"])
    assert ".tar" in error and "bytes" in error
    for path in cut.glob("*.tar"):
        path.unlink()
    assert ".tar" in fails(capfd, [str(finished), new, f"data.shards={cut}", "data.num_workers=2"])


def test_a_run_is_not_continued_with_other_data_or_another_recipe(capfd, finished, tmp_path):
    same = [str(finished), "data.global_batch_size=24"]
    error = fails(capfd, [*same, "schedule.total=4 steps", "optim.lr=2e-3"])
    assert "optim.lr: 0.001 → 0.002" in error and "checkpoint.allow_changes=[optim.lr]" in error
    assert "checkpoint.resume is never" in fails(capfd, [*same, "schedule.total=4 steps", "checkpoint.resume=never"])
    (tmp_path / "other").mkdir()
    from shards.convert import convert
    from tests.images import make_image_folder

    make_image_folder(tmp_path / "images", num_images=40, classes=2, size=32, seed=5)
    convert(tmp_path / "images", tmp_path / "other", workers=1)
    error = fails(capfd, [*same, "schedule.total=4 steps", f"data.shards={tmp_path / 'other'}"])
    assert "other data" in error and "checkpoint.allow_changes=[data]" in error


def test_allowed_changes_and_a_start_from_another_run(capfd, finished, tmp_path):
    common = [str(finished), "data.global_batch_size=24", f"run.dir={tmp_path / 'next'}",
              f"checkpoint.resume={finished.with_suffix('')}"]  # fmt: skip
    allow = "checkpoint.allow_changes=[schedule.total]"
    assert main([*common, "schedule.total=6 steps", allow]) == 0
    assert [row["step"] for row in rows(tmp_path / "next")] == [5, 6]
    wider = [*common[:2], f"run.dir={tmp_path / 'wider'}", common[3], "schedule.total=4 steps", "method.embed_dim=48",
             "checkpoint.allow_changes=[method.embed_dim]"]  # fmt: skip
    assert "another architecture" in fails(capfd, wider)


def test_samples_that_cannot_be_decoded_are_replaced_counted_and_limited(capfd, tmp_path):
    from shards.convert import convert
    from tests.images import make_image_folder

    paths = make_image_folder(tmp_path / "images", num_images=120, classes=2, size=32, format="jpeg", seed=5)
    for path in paths[:3]:
        path.write_bytes(path.read_bytes()[:300])  # the header stays whole, so conversion takes them
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    recipe = write_recipe(tmp_path / "run.yaml", "simclr", shards=tmp_path / "shards")
    arguments = [str(recipe), "data.global_batch_size=24", "schedule.total=10 steps"]
    assert main([*arguments, "run.stop_after=7 steps"]) == 0
    assert main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert len(records) == 6 == rows(tmp_path / "run")[-1]["rejected"]  # 240 images are two epochs
    assert len({r["id"] for r in records}) == 3 and all(r["id"] != r["replacement_id"] for r in records)
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)

    for path in paths[:20]:
        path.write_bytes(path.read_bytes()[:300])
    convert(tmp_path / "images", tmp_path / "worse", workers=1)
    error = fails(
        capfd, [str(recipe), *arguments[1:], f"data.shards={tmp_path / 'worse'}", f"run.dir={tmp_path / 'w'}"]
    )
    assert "could not be decoded, above the limit of 10" in error and "rejected.jsonl" in error


def test_a_failing_run_says_why_in_exit_json_and_a_new_start_forgets_it(capfd, finished, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [str(finished), "data.global_batch_size=24", "schedule.total=4 steps", f"run.dir={run_dir}"]
    error = fails(capfd, [*arguments, "strategy.micro_batch_size=7"])
    left = json.loads((run_dir / "exit.json").read_text())
    assert left == {"reason": "error", "requeue": False, "error": error.removeprefix("error: ")}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaler.train.train", lambda **_: seen.append((run_dir / "exit.json").exists()) or "done")
        assert main(arguments) == 0
    assert seen == [False]


def test_two_runs_cannot_write_one_run_directory(capfd, finished, tmp_path):
    """A real run, killed: what comes meanwhile is refused and touches nothing, what comes after goes on at once."""
    run_dir = tmp_path / "run"
    arguments = [str(finished), "data.global_batch_size=24", "data.num_workers=1", f"run.dir={run_dir}"]
    command = [sys.executable, "-m", "scaler.train", *arguments, "schedule.total=100000 steps"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for_rows(run_dir, 3, first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scaler.lock._WAIT_HERE", 0.5)
            error = fails(capfd, [*arguments, "schedule.total=4 steps"])
        assert f"process {first.pid} on {socket.gethostname()}" in error and "choose another run.dir" in error
        assert not (run_dir / "exit.json").exists() and first.poll() is None
        more = len(rows(run_dir)) + 2
        wait_for_rows(run_dir, more, first)
    finally:
        first.kill()
        first.wait()
    for path in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(path)  # of another length of the run
    assert main([*arguments, "schedule.total=4 steps"]) == 0
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


class Fault:
    """Makes the losses of some calls of a method's `learn` NaN."""

    def __init__(self, patch: pytest.MonkeyPatch, *, calls: range) -> None:
        self.calls, self.count, learn = calls, 0, SimCLR.learn

        def faulty(method: SimCLR, *args: Any) -> dict[str, Any]:
            out = learn(method, *args)
            self.count += 1
            return {**out, "loss": out["loss"] * float("nan")} if self.count in self.calls else out

        patch.setattr(SimCLR, "learn", faulty)


@pytest.mark.parametrize("every", [2, 100])  # with a checkpoint to go back to, and without
def test_a_passing_fault_is_cured_by_going_back(capfd, monkeypatch, shards, tmp_path, every):
    short = ["schedule.total=8 steps", "data.global_batch_size=24", "run.max_nonfinite=2"]
    short += [f"checkpoint.every={every} steps"]
    whole = write_recipe(tmp_path / "whole.yaml", "simclr", shards=shards)
    assert main([str(whole), *short]) == 0
    fault = Fault(monkeypatch, calls=range(6, 8))
    broken = write_recipe(tmp_path / "broken.yaml", "simclr", shards=shards)
    assert main([str(broken), *short]) == 0
    assert fault.count == 8 + (8 - 4 if every == 2 else 8)  # one step more than the two that failed: flags come late
    output = capfd.readouterr().out
    assert "steps 6 to 7 had non-finite losses or gradients" in output and "Going back to the last checkpoint" in output
    assert "step 6: the loss or gradient is not finite; the step was not taken" in output
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    mine, reference = (weights(tmp_path / name / "checkpoints" / "step-00000008") for name in ("broken", "whole"))
    assert all(torch.equal(mine[name], reference[name]) for name in reference)
    assert json.loads((tmp_path / "broken" / "exit.json").read_text())["reason"] == "done"


def test_a_step_with_a_fault_is_left_out_and_the_run_goes_on(monkeypatch, shards, tmp_path):
    Fault(monkeypatch, calls=range(3, 4))
    recipe = write_recipe(tmp_path / "run.yaml", "simclr", shards=shards)
    assert main([str(recipe), "schedule.total=5 steps", "data.global_batch_size=24"]) == 0
    table = rows(tmp_path / "run")
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5]
    assert table[2]["grad_norm"] is None and all(row["grad_norm"] > 0 for row in table if row["step"] != 3)


def test_a_run_that_diverges_again_stops_and_says_what_to_change(capfd, shards, tmp_path):
    recipe = write_recipe(tmp_path / "run.yaml", "simclr", shards=shards)
    arguments = [str(recipe), "data.global_batch_size=24", "optim.lr=1e30", "optim.clip_norm=null"]
    error = fails(capfd, [*arguments, "run.max_nonfinite=3"])
    first = int(re.search(r"steps (\d+) to (\d+) had non-finite losses", error)[1])
    assert f"`scaler batch RUN --step {first}`" in error and "lower optim.lr" in error
    assert "also after going back to the last checkpoint" in error
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["error"] == error.removeprefix("error: ")
    assert "going back" not in fails(capfd, [*arguments, "run.max_nonfinite=3", "run.max_rewinds=0"])
