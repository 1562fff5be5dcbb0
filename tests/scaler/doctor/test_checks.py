"""A check that crashes, hangs or is killed is a finding, after those that it had made."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler.doctor import checks

_SOURCE = """
import json, os, signal, sys, time
from scaler.doctor.finding import Finding
def check(asked):
    print("noise on standard output")
    yield Finding("ok", "first", "seen")
    print("half way", file=sys.stderr, flush=True)
    if asked["how"] == "raises": raise ImportError("libfoo.so: undefined symbol")
    if asked["how"] == "dies": os.kill(os.getpid(), signal.SIGSEGV)
    if asked["how"] == "hangs": time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ends", None),
        ("raises", "this check failed: ImportError: libfoo.so: undefined symbol"),
        ("dies", "this check was ended by SIGSEGV: half way"),
        ("hangs", "this check was not done after 1 s: half way"),
    ],
)
def test_how_a_check_can_end(how: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_check.py").write_text(_SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(checks.CHECKS, "own", "own_check")
    first, *others = checks.run_check("own", {"how": how}, seconds=1 if how == "hangs" else 60)
    assert (first.check, first.found) == ("first", "seen")
    assert [finding.found for finding in others] == ([said] if said else [])
    assert not others or "half way" in others[0].facts["said"]
