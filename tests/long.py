"""What takes minutes and is run when asked for."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("SCALER_TEST_LONG") == "1"
only_long = pytest.mark.skipif(not LONG, reason="takes minutes: SCALER_TEST_LONG=1 runs it")
