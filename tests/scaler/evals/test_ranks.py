"""Evaluations on four ranks, each of which has a part of the samples, give what one rank gives; in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scaler.collectives import World
from scaler.evals import store
from scaler.evals.features import Part, extract_features, extract_part
from scaler.evals.knn import knn_scores, neighbours, votes
from scaler.evals.linear import linear_scores
from scaler.evals.scores import mean_scores
from shards.convert import convert
from shards.index import ShardIndex
from tests.distributed.helper import run_distributed
from tests.images import make_image_folder
from tests.scaler.evals.test_features import VIEW, patches
from tests.scaler.evals.test_knn import close_together
from tests.scaler.evals.test_linear import digits

INPUTS = {"left": slice(0, 32), "all": slice(None)}


def part_of(whole: Part, rank: int) -> Part:
    """One row, none, and every second of the others."""
    rows = {0: slice(0, 1), 1: slice(0, 0), 2: slice(1, None, 2), 3: slice(2, None, 2)}[rank % 4]
    return Part(*(tensor[rows] for tensor in whole))


def brightness(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"mean": images.mean(dim=(1, 2, 3)), "label": labels.double()}


def job(world: World, shards: str, kept: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    split = (lambda part, turn=0: part) if world.size == 1 else (lambda part, turn=0: part_of(part, world.rank + turn))
    found: dict[str, Any] = {}
    train, test = close_together(seed=5, n=400)
    own = split(train), split(test, 1)
    rows = [votes(*row, 0.07, 7) for row in neighbours(*own, k=20, world=world, block=(32, 50))]
    found["predictions"] = own[1].ids, torch.cat(rows).argmax(dim=1)
    found["knn"] = knn_scores(*own, ks=[20, 1, 5], num_classes=7, world=world)
    found["among themselves"] = knn_scores(split(test), split(test), ks=[3], num_classes=7, world=world, leave_out=True)

    train, test = digits()
    rates = (1e-3, 1e-2, 0.1)  # of which the last rank gets none
    options = {"inputs": INPUTS, "num_classes": 10, "learning_rates": rates, "min_steps": 100, "epochs": 0.0}
    result = linear_scores(split(train), split(test, 2), world=world, **options)
    found["linear"] = result.scores, {(row.input, row.lr): (row.top1, row.loss) for row in result.grid}

    store.CHUNK = 4
    index, common = ShardIndex.load(shards), {"view": VIEW, "batch_size": 3, "num_workers": 0}
    options = {**common, "device": "cpu", "world": world}
    found["features"] = extract_features(patches, index, **options)
    features = store.FeatureStore(store.Kept(kept), {"weights": "a"})
    extraction = extract_part(patches, index, store=features, **options)
    found["extracted"] = extraction.images, extraction.part.ids.tolist()
    found["again"] = extract_part(patches, index, store=features, **options).images
    normalization = ((0.0,) * 3, (1.0,) * 3)
    found["scores"] = mean_scores(
        brightness, index, world=world, device=torch.device("cpu"), normalization=normalization, **common
    )
    return found


def test_four_ranks_find_what_one_finds(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", num_images=23, classes=3, size=48)
    convert(tmp_path / "images", tmp_path / "shards", shard_size="20KB", workers=1)
    ranks = run_distributed(job, 4, str(tmp_path / "shards"), str(tmp_path / "kept"))
    chunk = store.CHUNK
    alone = job(World(), str(tmp_path / "shards"), str(tmp_path / "kept"))
    store.CHUNK = chunk
    assert alone["extracted"][0] == 0, "what four ranks have kept, one takes"
    assert sorted(i for rank in ranks for i in rank["extracted"][1]) == alone["extracted"][1] == list(range(23))
    predictions = {}
    for rank in ranks:
        assert rank["knn"] == alone["knn"] and rank["among themselves"] == alone["among themselves"]
        predictions |= dict(zip(*(column.tolist() for column in rank["predictions"]), strict=True))
        scores, grid = rank["linear"]
        assert scores == pytest.approx(alone["linear"][0], rel=1e-5)
        assert grid.keys() == alone["linear"][1].keys() and len(grid) == 6
        assert all(row == pytest.approx(alone["linear"][1][key], rel=1e-5) for key, row in grid.items())
        torch.testing.assert_close(rank["features"], alone["features"], rtol=1e-6, atol=1e-6)
        assert (rank["extracted"][0], rank["again"]) == (23, 0)
        assert rank["scores"] == (pytest.approx(alone["scores"][0], rel=1e-6), 0)
    assert [predictions[i] for i in range(90)] == alone["predictions"][1].tolist()
