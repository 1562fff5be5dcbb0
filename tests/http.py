"""HTTP servers for tests of remote shards: the real nginx, and one of our own that fails on purpose.

with nginx(folder) as server:
    ShardIndex.load(server.url)
    server.stop(); server.start()
    server.requests()

with faulty_server(folder) as server:
    server.cut_every = 3
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.packages import PATH, install

_NGINX = """
{user}
worker_processes 1;
daemon off;
pid {work}/pid;
error_log {work}/error.log;
events {{}}
http {{
    log_format ranges '$remote_addr $status $body_bytes_sent $uri $http_range';
    access_log {work}/access.log ranges;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{
        listen {address}:{port};
        root {folder};
        {extra}
    }}
}}
"""


@dataclass(frozen=True)
class Request:
    """One answer of a server: bytes `start … stop - 1` of a file (`stop` None: to its end), and how it went."""

    path: str
    status: int
    start: int
    stop: int | None
    sent: int
    client: str


class Nginx:
    """A running nginx that serves `folder`; `extra` is what its configuration says besides."""

    def __init__(self, folder: Path, work: Path, *, address: str, extra: str) -> None:
        self.folder, self.work, self.address, self.port, self.extra = folder, work, address, free_port(), extra
        self.url = f"http://{address}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again with another `extra`, on the same port."""
        user = "user root;" if os.geteuid() == 0 else ""  # which may read pytest's folders
        text = _NGINX.format(
            user=user, work=self.work, address=self.address, port=self.port, folder=self.folder, extra=self.extra
        )
        (self.work / "nginx.conf").write_text(text)
        program, work = str(shutil.which("nginx", path=PATH)), str(self.work)
        options = ["-c", f"{work}/nginx.conf", "-p", work, "-e", f"{work}/error.log"]
        self.process = subprocess.Popen([*with_parent("TERM"), program, *options])
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1):
                return
            assert self.process.poll() is None and time.monotonic() < deadline, (self.work / "error.log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGTERM: connections are cut at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
            self.process = None

    def kill(self) -> None:
        """SIGKILL, worker processes included: answers end in the middle."""
        if self.process is not None:
            for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            self.process = None

    def requests(self) -> list[Request]:
        """What was asked for so far."""
        return [_parse(line) for line in (self.work / "access.log").read_text().splitlines()]


@contextlib.contextmanager
def nginx(folder: Path, *, address: str = "127.0.0.1", extra: str = "") -> Iterator[Nginx]:
    """Serve a folder; skips the test, with the reason, where there can be no nginx."""
    if (reason := install({"nginx": "nginx-light"})) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="nginx-") as work:
        os.chmod(work, 0o755)
        server = Nginx(folder, Path(work), address=address, extra=extra)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class FaultyServer:
    """Serves `folder` with ranges, and what a test asks for besides.

    Attributes:
        url: where.
        requests: what was answered, in order.
        cut_every: every so many bodies the connection ends at a random byte of it; 0: never.
        damage: (path, first byte, bytes) → the bytes to send instead.
        status: path → a status to answer with.
        ranges: whether ranges are known at all.
        delay: seconds before each answer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self._random = folder, list[Request](), random.Random(0)
        self.cut_every, self.ranges, self.delay, self._bodies = 0, True, 0.0, 0
        self.damage: Callable[[str, int, bytes], bytes] = lambda path, start, data: data
        self.status: dict[str, int] = {}
        self.port, self._server = free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port each time."""
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each body waits 40 ms for its header to be acknowledged

            def do_GET(self) -> None:
                faulty._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        time.sleep(self.delay)
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        file, running = self.folder / path, self._server
        status = self.status.get(path, 200 if file.is_file() else 404)
        if running is None or status != 200:
            handler.close_connection = True
            if running is not None:
                self.requests.append(Request(path, status, 0, None, 0, ""))
                handler.send_error(status)
            return
        content = file.read_bytes()
        start, stop = 0, None
        if self.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))):
            start, stop, status = int(match[1]), int(match[2]) + 1 if match[2] else None, 206
        data = self.damage(path, start, content[start:stop])
        self._bodies += 1
        cut = self.cut_every and self._bodies % self.cut_every == 0
        sent = self._random.randrange(len(data)) if cut and data else len(data)
        self.requests.append(Request(path, status, start, stop, sent, ""))
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{len(content)}")
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(data[:sent])
            handler.wfile.flush()
        if sent < len(data):
            handler.close_connection = True


@contextlib.contextmanager
def faulty_server(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder until the block ends."""
    server = FaultyServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def flip_byte(path: str, offset: int, *, times: int) -> Callable[[str, int, bytes], bytes]:
    """A `damage`: byte `offset` of a file is wrong in the first `times` answers that hold it."""
    left = [times]

    def damage(asked: str, start: int, data: bytes) -> bytes:
        if asked != path or not start <= offset < start + len(data) or not left[0]:
            return data
        left[0] -= 1
        return data[: offset - start] + bytes([data[offset - start] ^ 1]) + data[offset - start + 1 :]

    return damage


def with_parent(signal_name: str) -> list[str]:
    """Words before a command that has to end (by this signal) when the test's process does, however that does."""
    return ["setpriv", "--pdeathsig", signal_name] if shutil.which("setpriv") else []


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _parse(line: str) -> Request:
    client, status, sent, path, range_ = line.split()
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", range_)
    start, stop = (int(match[1]), int(match[2]) + 1 if match[2] else None) if match else (0, None)
    return Request(unquote(path).lstrip("/"), int(status), start, stop, int(sent), client)
