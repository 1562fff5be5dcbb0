"""Packages that do not fit are found in what pip has left, and named with what mends them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scaler.doctor.finding import worst
from scaler.doctor.versions import check
from tests.scaler.doctor.faults import old_package


def test_what_is_installed_here_fits() -> None:
    findings = list(check({}))
    assert [finding.check for finding in findings] == ["Python", "packages"] and worst(findings) == "ok"
    assert findings[1].facts.keys() >= {"torch", "torchvision", "timm", "accelerate"}


def test_old_and_unfit_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_package(tmp_path, "deepspeed", "0.15.4")
    old_package(tmp_path, "torchvision", "0.26.0", "torch (==2.11.0)", 'scipy (>=99) ; extra == "scipy"')
    old_package(tmp_path, "timm", "1.0.31", "torch", "no-such-package>=2", 'colorama>=99; sys_platform == "win32"')
    monkeypatch.syspath_prepend(tmp_path)
    errors = [finding for finding in check({}) if finding.level == "error"]
    assert [finding.check for finding in errors] == ["deepspeed", "torch", "no-such-package"]
    old, pair, missing = errors
    assert old.found.startswith("0.15.4 is installed, scaler ") and old.found.endswith("wants >=0.19")
    assert old.fix == "pip install --upgrade 'deepspeed>=0.19'"
    assert pair.found.endswith("torchvision 0.26.0 wants ==2.11.0")
    assert re.fullmatch(r"pip install --upgrade 'torch==[\d.]+' torchvision", pair.fix)
    assert missing.found == "missing; timm 1.0.31 needs it" and missing.fix == "pip install 'no-such-package>=2'"
    twice = {finding.check: finding.found for finding in check({}) if finding.level == "warning"}
    assert twice.keys() == {"deepspeed", "torchvision"} and str(tmp_path) in twice["deepspeed"]


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    *_, said = check({})
    assert said.level == "warning" and said.fix == "pip install -e ."
