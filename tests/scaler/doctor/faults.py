"""Real faults of an installation and of a machine, made where nothing else sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

_SITE = Path(sysconfig.get_paths()["purelib"])


def old_package(site: Path, name: str, version: str, *requires: str) -> None:
    """What pip leaves of a package's release in a site folder: the record of its version and needs."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def wrong_torchvision(site: Path) -> None:
    """torchvision whose compiled half is of another torch, as the loader sees it: its operations are not there."""
    old_package(site, "torchvision", "0.26.0", "torch (==2.11.0)")
    shutil.copytree(
        _SITE / "torchvision",
        site / "torchvision",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("_C*", "image*.so", "__pycache__"),
    )


def small_machine(command: Sequence[str], full: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """Run a command where `full` is a disk of 2 MB and /dev/shm, as in Docker, one of 64 MB.

    Skips the test, with the reason, where nothing can be mounted.
    """
    mounts = 'mount -t tmpfs -o size=2m tmpfs "$0" && mount -t tmpfs -o size=64m tmpfs /dev/shm'
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a full disk takes root and unshare")
    inside = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', str(full)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here")
    environment = {**os.environ, **options}
    return subprocess.run([*inside, *command], env=environment, capture_output=True, text=True, timeout=120)
