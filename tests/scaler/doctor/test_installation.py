"""torch, torchvision and the device, as they really work; `scaler doctor --quick` as a healthcheck runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scaler.doctor.finding import worst
from scaler.doctor.installation import check
from tests.scaler.doctor.faults import wrong_torchvision
from tests.scaler.test_cli import scaler


def test_this_installation_works() -> None:
    findings = list(check({"quick": False}))
    assert worst(findings) == "ok" or torch.cuda.is_available()  # somebody else may be on the GPU
    device = "GPU 0" if torch.cuda.is_available() else "CPU"
    assert [finding.check for finding in findings[:3]] == ["torch", "torchvision", device]
    assert findings[0].facts["torch"] == torch.__version__


def test_a_wrong_pair_fails_the_healthcheck_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_torchvision(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = scaler("doctor", "--quick", "--json")
    facts = json.loads(said.stdout)
    assert said.returncode == 1 and facts["error"] == 2
    declared, real = (finding for finding in facts["findings"] if finding["level"] == "error")
    assert declared["check"] == "torch" and "torchvision 0.26.0 wants ==2.11.0" in declared["found"]
    assert "operator torchvision::nms does not exist" in real["found"]
    version = torch.__version__.partition("+")[0]
    assert declared["fix"] == real["fix"] == f"pip install --upgrade 'torch=={version}' torchvision"
