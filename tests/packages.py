"""Debian packages for tests that want a real server: installed as root where that does no harm."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SECONDS = 240


def install(packages: Mapping[str, str]) -> str | None:
    """Make sure that there are these programs (program → package that has it); why that cannot be, or None."""
    with (Path(tempfile.gettempdir()) / "packages-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests have several workers, and apt-get serves one
        missing = sorted({package for name, package in packages.items() if shutil.which(name, path=PATH) is None})
        wanted = f"apt-get install {' '.join(missing)}"
        if not missing:
            return None
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            return f"missing here: {', '.join(missing)}"
        if Path("/run/systemd/system").exists():  # a real machine, on which a server would open a port at once
            return f"missing here: {', '.join(missing)}; {wanted}"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        for line in (
            command,
            ["apt-get", "update"],
            command,
        ):  # a fresh image has no package lists, an old one old ones
            try:
                result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=_SECONDS)
            except subprocess.TimeoutExpired:
                return f"`{' '.join(line)}` took more than {_SECONDS} s"
            if result.returncode == 0 and line is command:
                return None
        return f"`{wanted}` failed: {(result.stderr.strip().splitlines() or ['without a word'])[-1]}"
