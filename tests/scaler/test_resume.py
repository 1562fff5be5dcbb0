"""What may differ between a run and its continuation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from scaler.recipe import load_recipe
from scaler.resume import check_continues


def continues(before: dict[str, Any], now: dict[str, Any], *allowed: str) -> None:
    manifest = {"fingerprint": "f", "recipe": before}
    check_continues(manifest, recipe=now, fingerprint="f", allowed=allowed, path=Path("step-00000001"))


def test_an_option_that_is_newer_than_the_checkpoint_counts_as_its_default() -> None:
    now = load_recipe("dinov2/demo").model_dump(mode="json")
    old = copy.deepcopy(now)
    for key in [key for key in old["method"] if key.startswith("gram_")]:
        del old["method"][key]
    continues(old, now)
    anchored = {**now, "method": {**now["method"], "gram_weight": 2.0}}
    with pytest.raises(ValueError, match=r"another recipe \(method\.gram_weight: 0\.0 → 2\.0\).*allow_changes=\["):
        continues(old, anchored)
    continues(old, anchored, "method.gram_weight")


def test_an_option_that_is_unknown_here_is_named() -> None:
    now = load_recipe("simclr/demo").model_dump(mode="json")
    newer = {**now, "method": {**now["method"], "from_the_future": 3}}
    with pytest.raises(ValueError, match=r"method\.from_the_future: 3 → None"):
        continues(newer, now)
    elsewhere = {**now, "run": {**now["run"], "dir": "runs/other"}, "track": {}}
    continues(elsewhere, now)


def test_who_decodes_is_part_of_a_run() -> None:
    """A GPU's pixels differ by some grey levels: a run goes on with them only if that is meant."""
    before = load_recipe("simclr/demo", shards="shards").model_dump(mode="json")
    now = load_recipe("simclr/demo", shards="shards", overrides=["data.decode=gpu"]).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"data\.decode: 'cpu' → 'gpu'.*allow_changes=\[data\.decode\]"):
        continues(before, now)
    continues(before, now, "data.decode")
    del before["data"]["decode"]  # of an older version
    with pytest.raises(ValueError, match=r"data\.decode: 'cpu' → 'gpu'"):
        continues(before, now)
