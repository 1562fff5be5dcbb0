"""What a run ran on: code, packages, machine. Written to `RUN/run.json` and shown by trackers and reports."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from scaler.nested import without_credentials

# What decides results and speed.
PACKAGES = (
    "scaler",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "deepspeed",
    "webdataset",
    "simplejpeg",
    "pillow",
    "numpy",
    "safetensors",
)
_GIT_SECONDS = 10.0


def environment() -> dict[str, Any]:
    """Plain data: `command`, `git`, `packages` (None: not installed), `python`, `host`, `system`, `cpu`, `cores`,
    `memory_gib`, `gpus` (names), and where there are GPUs `cuda`, `driver`, `cudnn` and `nccl`."""
    found: dict[str, Any] = {
        "command": shlex.join(without_credentials(["python", *sys.orig_argv[1:]])),
        "git": git_state(Path(__file__).parent),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if found["gpus"]:
        found |= {
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch (None: detached) and uncommitted changes of the checkout that holds `folder`; None: there is none,
    or no git."""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    facts = dict(line.removeprefix("# ").split(" ", 1) for line in lines if line.startswith("# branch."))
    branch = facts.get("branch.head")
    return {
        "commit": facts.get("branch.oid"),
        "branch": None if branch == "(detached)" else branch,
        "changed_files": sum(not line.startswith("# ") for line in lines),
    }


def version(package: str) -> str | None:
    """Of an installed package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, as it says itself; None: it is not loaded."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
