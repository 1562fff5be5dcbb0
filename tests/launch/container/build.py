"""Building the image without an engine, in a Debian tree that debootstrap makes: minutes, and 9 GB on the disk.

    python -m tests.launch.container.build /scratch/image       # then SCALER_TEST_IMAGE=/scratch/image for the tests

apt and pip are this machine's: their variables and the certificates that these name are passed on, nothing is kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.container.dockerfile import carry_out, context_of
from tests.launch.container.image import BUILD, CONTAINER, FINAL, ROOT
from tests.launch.container.root import root_over
from tests.packages import install

_SUITE = "bookworm"
_PASSED_ON = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE")
# As in the images of Debian and Ubuntu: packages start no services while an image is built.
_NO_SERVICES = "#!/bin/sh\nexit 101\n"


def build(folder: Path) -> list[Path]:
    """Build in `folder`, or take what an earlier call has built there; the image's trees, the topmost first."""
    base, final = folder / _SUITE, folder / "final"
    trees = [final / "upper", base]
    if (folder / "done").exists():
        return trees
    if (reason := install({"debootstrap": "debootstrap"})) is not None:
        pytest.skip(reason)
    if not (folder / "bootstrapped").exists():
        command = ["debootstrap", "--variant=minbase", _SUITE, str(base)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr
        (folder / "bootstrapped").touch()
    (base / "usr/sbin/policy-rc.d").write_text(_NO_SERVICES)
    (base / "usr/sbin/policy-rc.d").chmod(0o755)
    shutil.copy("/etc/resolv.conf", base / "etc/resolv.conf")
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    for name, value in environment.items():
        if os.path.isfile(value):  # where no package writes, as ca-certificates would to /etc/ssl
            environment[name] = f"/var/tmp/{name}"
            shutil.copy(value, base / "var/tmp" / name)

    context = folder / "context"
    shutil.rmtree(context, ignore_errors=True)
    context_of(ROOT, (CONTAINER / "Dockerfile.dockerignore").read_text(), context)
    for name in ("build", "final"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    with root_over([base], upper=folder / "build", network=True) as first:
        options = {"context": context, "arguments": {}, "environment": environment}
        carry_out(BUILD, first, stages={}, **options)
        with root_over([base], upper=final, network=True) as second:
            assert carry_out(FINAL, second, stages={BUILD.name: first}, **options) == "1000"
    shutil.rmtree(folder / "build")
    (folder / "done").touch()
    return trees


if __name__ == "__main__":
    print(*build(Path(sys.argv[1])))
