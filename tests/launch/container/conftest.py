"""The container under test: the Dockerfile's steps over this machine's programs; SCALER_TEST_LONG=1: built in full."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.container.build import build
from tests.launch.container.image import Container, container
from tests.long import only_long


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The trees of the image, built in a Debian tree, once for all workers; SCALER_TEST_IMAGE: there, to be kept."""
    folder = Path(os.environ.get("SCALER_TEST_IMAGE", tmp_path_factory.getbasetemp().parent / "image"))
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder)


@pytest.fixture(scope="module", params=["machine", pytest.param("built", marks=only_long)])
def box(request: pytest.FixtureRequest) -> Iterator[Container]:
    with container(request.getfixturevalue("built") if request.param == "built" else None) as box:
        yield box
