"""What a run says of the machine and the code that it ran on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from scaler.environment import environment, git_state


def test_it_is_plain_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "data.shards=https://me:secret@host/x?token=abc"
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "scaler.train", "simclr/demo", secret])
    found = json.loads(json.dumps(environment()))
    assert found["command"] == "python -m scaler.train simclr/demo data.shards=https://host/x"
    assert torch.__version__.startswith(found["packages"]["torch"]) and found["packages"]["scaler"]
    assert found["cores"] >= 1 and found["memory_gib"] > 0.1 and found["cpu"] and found["host"]
    assert len(found["gpus"]) == torch.cuda.device_count() and ("driver" in found) == bool(found["gpus"])


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    assert git_state(tmp_path) is None
    git("init", "--initial-branch", "work")
    for name in ("a", "b"):
        (tmp_path / name).write_text("one")
        git("add", name)
    git("commit", "--message", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "branch": "work", "changed_files": 0}
    (tmp_path / "a").write_text("two")
    (tmp_path / "new").write_text("not of the checkout")
    git("checkout", "--detach")
    assert git_state(tmp_path) == {"commit": commit, "branch": None, "changed_files": 1}
