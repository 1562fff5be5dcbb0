"""The cost of our loop beside a bare one, and the only place where a step of ours would wait for a GPU."""

from __future__ import annotations

import pytest

from scaler.bench.loop import as_lines, as_table, measure


def test_a_logged_step_waits_once_in_one_place():
    small = ["data.global_batch_size=8", "method.depth=1", "track.log_every=2 steps"]
    result = measure("dinov2/demo", overrides=small, steps=2, rounds=2)
    assert set(result["step_ms"]) == {"ours", "bare"} and min(result["step_ms"].values()) > 0
    assert set(result["row_ms"]) == {"no tracker", "tensorboard"} and min(result["row_ms"].values()) > 0
    assert all(0 < milliseconds < 100 for milliseconds in result["outside_ms"].values())
    everything, rest = result["collection"]["full_ms"].values()
    assert rest < everything / 5
    assert result["logged_steps"] == result["profiled_steps"] // 2
    assert sum(result["host_syncs"].values()) == result["logged_steps"]
    assert all(place.startswith("tolist at scaler/loop.py:") for place in result["host_syncs"])
    assert as_table(result).row_count == 9 and "would wait for a GPU 2 times" in list(as_lines(result))[-1]


def test_unknown_trackers_are_refused():
    with pytest.raises(ValueError, match=r"no tracker 'neptune'; valid names: tensorboard, wandb, or none"):
        measure("dinov2/demo", trackers=["neptune"])
