"""The order of the test files, and what tests of Triton's kernels need.

Files that take minutes come first, so that none keeps one worker busy at the end. Without a GPU, kernels are run by
Triton's interpreter on tensors of the CPU, which it must be told before anybody imports it.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

MINUTES = (
    "tests/test_readme.py",
    "tests/distributed/",
    "tests/scaler/methods/dinov2/test_strategies.py",
    "tests/scaler/plan/",
    "tests/launch/",
    "tests/scaler/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by the first prefix that fits; files of one prefix stay in their order."""

    def place(item: pytest.Item) -> int:
        return next((i for i, prefix in enumerate(MINUTES) if item.nodeid.startswith(prefix)), len(MINUTES))

    items.sort(key=place)
