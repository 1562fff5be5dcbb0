"""The run's log: exact rows, cutting back on resume, trackers read back with their own readers, what people see."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaler.metrics import MetricsLog, cut_back
from scaler.nested import without_credentials
from scaler.recipe import Track
from scaler.throughput import Supply

QUIET = Track(tensorboard=False)


def open_log(
    run_dir: Path,
    *,
    start: int = 0,
    total: int = 20,
    track: Track = QUIET,
    rank: int = 0,
    terminal: bool = False,
    **options: Any,
) -> tuple[MetricsLog, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120 if terminal else 60)
    log = MetricsLog(
        run_dir,
        rank=rank,
        start_step=start,
        total_steps=total,
        track=track,
        recipe={"seed": 3},
        supply=Supply(num_workers=1, processes=1, cores=4, remote=False, gpu=False),
        console=console,
        **options,
    )
    return log, out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@settings(max_examples=10, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_floats_read_back_bit_for_bit(values: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    with open_log(run)[0] as log:
        for step, value in enumerate(values, 1):
            log.log({"step": step, "loss": value, "loss/a": torch.tensor(value, dtype=torch.float64)})
    rows = rows_of(run / "metrics.jsonl")
    assert [np.float64(row["loss"]).tobytes() for row in rows] == [np.float64(value).tobytes() for value in values]
    assert [row["loss/a"] for row in rows] == values


def test_values_that_are_not_finite_become_null_and_scalars_become_numbers(tmp_path: Path) -> None:
    with open_log(tmp_path)[0] as log:
        log.log({"step": 1, "loss": math.nan, "grad_norm": torch.tensor(math.inf), "images": np.int64(7), "ok": True})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "images": 7, "ok": True}
    ]


def test_rows_are_in_the_file_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    log.log({"step": 1, "loss": 2.0})
    log.reject(1, [{"key": "a", "reason": "truncated"}, {"key": "b", "reason": "text"}])
    log.sync()
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert rows_of(tmp_path / "rejected.jsonl") == [
        {"step": 1, "key": "a", "reason": "truncated"},
        {"step": 1, "key": "b", "reason": "text"},
    ]
    log.close()
    log.close()


def test_names_that_are_not_unicode_survive(tmp_path: Path) -> None:
    source = b"caf\xe9/\xff.jpg".decode("utf-8", "surrogateescape")
    with open_log(tmp_path)[0] as log:
        log.reject(1, [{"source": source}, {"source": "日本/é.jpg"}])
    cut_back(tmp_path / "rejected.jsonl", step=1)
    assert [row["source"] for row in rows_of(tmp_path / "rejected.jsonl")] == [source, "日本/é.jpg"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 12), max_size=12),
    cut=st.integers(0, 13),
    torn=st.sampled_from([b"", b"{", b'{"step": 1, "loss": 0.', b'{"step": 1}', b"\x00\x00\n", b"7\n", b'{"a": 1}\n']),
)
def test_cutting_back_keeps_bytes(
    steps: list[int], cut: int, torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # spaces and key order differ from what json.dumps writes, so a rewrite through a parser would show
    lines = [f'{{"loss":  {i}.50, "step" : {step} }}\n'.encode() for i, step in enumerate(sorted(steps))]
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_bytes(b"".join(lines) + torn)
    cut_back(path, step=cut)
    assert path.read_bytes() == b"".join(line for line, step in zip(lines, sorted(steps), strict=True) if step <= cut)
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_cutting_nothing_leaves_the_file_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    cut_back(path, step=2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_resumed_log_continues_after_the_checkpoints_step(tmp_path: Path) -> None:
    with open_log(tmp_path)[0] as log:
        for step in range(1, 6):
            log.log({"step": step, "loss": float(step)})
            log.reject(step, [{"key": str(step)}])
    with open_log(tmp_path, start=3)[0] as log:
        log.log({"step": 4, "loss": 40.0})
    assert [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 40.0]
    assert [row["key"] for row in rows_of(tmp_path / "rejected.jsonl")] == ["1", "2", "3"]
    with open_log(tmp_path)[0]:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_other_ranks_write_and_print_nothing(tmp_path: Path) -> None:
    log, out = open_log(tmp_path / "run", rank=1, track=Track(tensorboard=True, wandb="offline"))
    log.log({"step": 1, "loss": 1.0})
    log.reject(1, [{"key": "a"}])
    log.progress(1, {"loss": 1.0})
    log.note("hello")
    log.sync()
    log.close()
    assert not (tmp_path / "run").exists() and out.getvalue() == ""


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    for start, end, factor in ((0, 5, 1.0), (3, 6, 10.0)):
        with open_log(tmp_path, start=start, track=Track(tensorboard=True))[0] as log:
            for step in range(start + 1, end + 1):
                log.log({"step": step, "loss": factor * step, "text": "no number", "missing": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    assert got == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [b"seed: 3" in event.tensor_proto.string_val[0] for event in events.Tensors("recipe/text_summary")] == [True]


def test_wandb_offline_keeps_one_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    track = Track(tensorboard=False, wandb="offline")
    ids = []
    for start in (0, 2):
        with open_log(tmp_path, start=start, track=track)[0] as log:
            log.log({"step": start + 1, "loss": 1.0})
        ids.append((tmp_path / "wandb_id.txt").read_text().strip())
    assert re.fullmatch(r"[0-9a-f]{8}", ids[0]) and ids[1] == ids[0]
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(folders) == 2 and all(re.fullmatch(rf"offline-run-[\d_]+-{ids[0]}(-\d)?", p.name) for p in folders)
    assert all(list(path.glob("*.wandb")) for path in folders)


def test_wandb_online_without_a_key_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "netrc")), ("WANDB_MODE", "online")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"track\.wandb is online.*wandb login"):
        open_log(tmp_path, track=Track(tensorboard=False, wandb="online"))


def test_in_a_sweep_the_agents_id_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    with open_log(tmp_path, track=Track(tensorboard=False, wandb="offline"))[0]:
        assert (tmp_path / "wandb_id.txt").read_text() == "trial7\n"


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track = Track(tensorboard=False, wandb="disabled", mlflow=True)
    for start in (0, 2):
        with open_log(tmp_path / "run", start=start, track=track)[0] as log:
            for step in range(start + 1, start + 3):
                log.log({"step": step, "loss": 10.0 * step, "loss/term": 1.0, "text": "no number"})
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("scaler").experiment_id])
    assert run.info.run_id == (tmp_path / "run" / "mlflow_id.txt").read_text().strip()
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3"} and run.data.tags["scaler.packages.torch"].startswith("2.")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert "loss/term" in run.data.metrics and "text" not in run.data.metrics


def test_a_tracker_that_cannot_start_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(ValueError, match=r"track\.mlflow is true.*MLFLOW_TRACKING_URI"):
        open_log(tmp_path, track=Track(tensorboard=False, wandb="disabled", mlflow=True))


def test_credentials_never_reach_a_tracker() -> None:
    recipe = {
        "data": {"shards": "https://user:secret@host/x/y?X-Signature=abc", "n": 3},
        "list": ["s3://bucket/key", "a://b@c/d"],
    }
    assert without_credentials(recipe) == {
        "data": {"shards": "https://host/x/y", "n": 3},
        "list": ["s3://bucket/key", "a://c/d"],
    }


ROW = {"epoch": 1.25, "loss": 5.4321, "lr": 0.00012, "images_per_second": 812.4, "data_wait": 0.034, "memory_gib": 1.5}


def test_plain_lines_are_whole_and_readable_in_a_log_file(tmp_path: Path) -> None:
    log, out = open_log(tmp_path)
    log.progress(1, {})
    log.progress(2, ROW)
    log.note("[saved] checkpoint step-00000002 " + "x" * 100)
    log.progress(3, {"loss": math.nan})
    first, note, last = out.getvalue().splitlines()
    assert re.fullmatch(
        r"step 2/20  epoch 1\.25  loss 5\.4321  lr 1\.20e-04  812 images/s  data wait 3%  1\.5 GiB  ETA \d+:\d\d:\d\d",
        first,
    )
    assert note == "[saved] checkpoint step-00000002 " + "x" * 100
    assert last.startswith("step 3/20  loss not finite  ETA ")


def test_the_time_left_follows_the_speed(tmp_path: Path) -> None:
    before = time.perf_counter()
    log, out = open_log(tmp_path, start=10, total=10 + 2000)
    time.sleep(0.1)
    log.progress(11, ROW)  # a tenth of a second and a little for one step; 1999 to go
    elapsed = time.perf_counter() - before
    hours, minutes, seconds = re.search(r"ETA (\d+):(\d\d):(\d\d)", out.getvalue()).groups()  # type: ignore[union-attr]
    assert 199 <= int(hours) * 3600 + int(minutes) * 60 + int(seconds) <= 1999 * elapsed + 1


def test_a_terminal_gets_a_bar_with_notes_above_it(tmp_path: Path) -> None:
    log, out = open_log(tmp_path, terminal=True)
    log.progress(1, ROW)
    log.note("saved [bold]")
    log.progress(20, {})
    log.close()
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "saved [bold]" in screen
    assert "1/20" in screen and "━" in screen
    last = screen.rstrip().splitlines()[-1]
    assert "20/20" in last and "loss 5.4321" in last and "ETA 0:00:00" in last


def test_a_sign_of_collapse_is_in_every_row_and_told_when_it_stays(tmp_path: Path) -> None:
    log, out = open_log(tmp_path, symptoms=lambda row: {"flat": "nothing moves"} if row["std"] < 0.1 else {})
    for step, std in enumerate([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5], start=1):
        log.log({"step": step, "loss": 1.0, "std": std})
    log.log({"step": 11, "loss": float("nan"), "std": 0.0})  # a step that was not taken says nothing
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl") if "alarm/flat" in row] == [
        1,
        2,
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    assert out.getvalue() == "alarm: nothing moves (seen in 5 logged rows)\n"


def test_gpus_that_idle_without_waiting_for_data_are_told_once(tmp_path: Path) -> None:
    log, out = open_log(tmp_path)
    for step in range(1, 30):
        log.log({"step": step, "gpu_utilization": 0.4 if step % 10 else 0.7, "data_wait": 0.0})
    for step in range(30, 60):  # those that wait for data are told so instead
        log.log({"step": step, "gpu_utilization": 0.4, "data_wait": 0.9})
    assert "GPUs were busy" not in out.getvalue()
    for step in range(60, 90):
        log.log({"step": step, "gpu_utilization": 0.4, "data_wait": 0.0})
    assert out.getvalue().count("the GPUs were busy 40% of the time, and below 60% for 10 logged rows") == 1


def test_starving_and_growing_runs_are_told_once(tmp_path: Path) -> None:
    log, out = open_log(tmp_path)
    for step in range(1, 30):
        log.log({"step": step, "data_wait": 0.5 if step % 10 else 0.1})
    assert out.getvalue() == ""  # never ten rows in a row
    for step in range(30, 60):
        log.log({"step": step, "data_wait": 0.45})
    assert len(out.getvalue().splitlines()) == 1 and "50% of the time" in out.getvalue()
    assert "data.num_workers" in out.getvalue()
    for step in range(60, 180):
        log.log({"step": step, "memory_gib": step / 10})
    for step in range(180, 300):
        log.log({"step": step, "memory_gib": 18.0})
    assert len(out.getvalue().splitlines()) == 2 and "memory grew" in out.getvalue()
