"""SimCLR's gradient is that of the global batch of 256 on any layout, under every strategy.

The models here are small; `python -m tests.distributed.global_batch` measures larger ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from scaler.collectives import World
from scaler.strategies import STRATEGIES
from tests.distributed.global_batch import (
    BATCH,
    DROP_PATH,
    RESNET,
    RESNET_64,
    Case,
    Layout,
    definition,
    difference,
    differences,
    main,
    make_method,
    one_gradient,
)
from tests.long import only_long

_SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 3, "head_out": 32}
SMALL_VIT = Case("vit", 16, {**DROP_PATH.settings, **_SMALL})
SMALL_RESNET = replace(RESNET_64, image_size=16, settings={**RESNET.settings, "backbone": "test_resnet"})


def test_gradients_of_the_global_batch() -> None:
    wanted = {case.name: definition(case) for case in (SMALL_VIT, SMALL_RESNET)}
    for count in (1, 4):
        pieces = one_gradient(World(), SMALL_VIT, Layout("ddp", count))
        assert difference([pieces], wanted["vit"]) <= SMALL_VIT.tolerance
    jobs = [*((SMALL_VIT, Layout(name, 2)) for name in STRATEGIES), (SMALL_RESNET, Layout("ddp", 1))]
    found = differences(2, jobs, wanted)
    assert all(value <= case.tolerance for (case, _), value in zip(jobs, found, strict=True)), found


def test_a_resnet_that_accumulates_is_refused_by_name() -> None:
    method = make_method(RESNET, world=World())
    method.check_layout(num_micro_batches=1, micro_batch_size=BATCH)
    with pytest.raises(ValueError, match=r"resnet18 has batch norm.*Set strategy\.micro_batch_size to 256"):
        method.check_layout(num_micro_batches=4, micro_batch_size=BATCH // 4)


@only_long
def test_gradients_of_larger_models() -> None:
    assert main() == 0
