"""What a check does to its own process, tests in one process must not feel."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks have little patience with stores, which each sets in the environment of a process of its own."""
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "5")
