"""What several files of this folder's tests start from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.s3 import s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 server, which the environment points to meanwhile."""
    before = dict(os.environ)
    with s3_server() as endpoint:
        yield endpoint
    os.environ.clear()
    os.environ |= before
