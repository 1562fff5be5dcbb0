"""Folders of this machine, of memory and of a real S3 server behave alike; their errors are one line with the place."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import socket
from pathlib import Path

import pytest

from shards.places import NoSuchHostError, RangeIgnoredError, Url, _plain_error, folder_at, locate, without_secrets
from tests.http import faulty_server
from tests.s3 import BUCKET, forbidden, rclone_server, use_s3


@pytest.fixture(params=["local", "file", "memory", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("server")
    return {
        "local": str(tmp_path / "a" / "b"),
        "file": f"file://{tmp_path}/c",
        "memory": f"memory://{tmp_path.name}/d",
        "s3": f"{BUCKET}/{tmp_path.name}/e/",
    }[request.param]


def test_a_folder_keeps_what_is_written_to_it(where: str) -> None:
    folder = folder_at(locate(where))
    assert folder.sizes() == {} and not folder.exists("x/one")
    folder.remove([])
    folder.remove_all()  # of nothing
    content = bytes(range(256)) * 3
    with folder.writing("x/one") as write:
        write(memoryview(content)[:100])
        write(content[100:])
    folder.write("two", b"2")
    again = folder_at(locate(where))
    assert again.sizes() == {"x/one": 768, "two": 1} and again.exists("x/one") and not again.exists("x")
    buffer = memoryview(bytearray(300))
    again.read_into("x/one", 200, buffer)
    again.read_into("x/one", 200, buffer[:0])
    assert again.read_range("x/one", 3, 5) == content[3:8] and again.read_range("x/one", 3, 0) == b""
    assert buffer == content[200:500] and again.read("x/one") == content and again.read("two") == b"2"
    assert folder_at(locate(where) / "x").sizes() == {"one": 768}
    folder.write("two", b"other")
    folder.write("three", b"")
    assert again.read("two") == b"other" and again.sizes()["three"] == 0
    again.remove(["two", "three"])
    assert folder.sizes() == {"x/one": 768}
    folder.remove_all()
    assert folder.sizes() == {}


def test_what_is_missing_or_too_short_is_said(where: str) -> None:
    folder = folder_at(locate(where))
    with pytest.raises(FileNotFoundError):
        folder.read("nothing")
    folder.write("five", b"12345")
    with pytest.raises(ValueError, match=r"five ends at byte 5$"):
        folder.read_into("five", 3, memoryview(bytearray(3)))
    with pytest.raises(ValueError, match=r"five ends (at byte|before the bytes)"):
        folder.read_range("five", 100, 3)


@pytest.mark.parametrize("where", ["local", "s3"], indirect=True)
def test_a_file_that_was_not_finished_is_not_there(where: str) -> None:
    folder = folder_at(locate(where))
    folder.write("kept", b"before")
    for name in ("new", "kept"):
        with contextlib.suppress(ZeroDivisionError, OSError), folder.writing(name) as write:
            write(b"half")
            raise ZeroDivisionError
    assert folder.sizes() == {"kept": 6} and folder.read("kept") == b"before"


def test_large_files_go_up_in_parts_and_are_read_by_range(server: str) -> None:
    folder = folder_at(Url(f"{BUCKET}/large"))
    content = os.urandom(1 << 20)
    with folder.writing("file") as write:
        for _ in range(70):  # more than a part of s3fs
            write(content)
    buffer = memoryview(bytearray(2000))
    folder.read_into("file", (65 << 20) - 1000, buffer)
    assert folder.sizes() == {"file": 70 << 20} and buffer == content[-1000:] + content[:1000]


def test_a_part_of_what_was_written_to_another_s3(server: str, tmp_path: Path) -> None:
    """rclone keeps the checksum that came with a file, and sends it with every part of it."""
    (tmp_path / "bucket").mkdir()
    with rclone_server(tmp_path) as endpoint:
        use_s3(endpoint)
        try:
            folder = folder_at(Url("s3://bucket/a"))
            folder.write("file", bytes(range(200)))
            assert folder.read_range("file", 10, 5) == bytes(range(10, 15)) and len(folder.read("file")) == 200
        finally:
            use_s3(server)


def test_locations_are_paths_or_urls() -> None:
    assert locate("file:///a/b") == locate("/a/b") == Path("/a/b") and locate("a") == Path("a")
    url = locate("s3://bucket/a/")
    assert str(url / "b") == "s3://bucket/a/b" and (url / "b").name == "b" and (url / "b").parent == url
    assert str(url / "b c?#") == "s3://bucket/a/b c?#"


def test_http_urls_keep_their_query_and_their_secrets() -> None:
    url = locate("https://me:word@host/a/?sig=1&b=2")
    file = url / "b c?#%.tar"
    assert isinstance(file, Url) and file.text == "https://me:word@host/a/b%20c%3F%23%25.tar?sig=1&b=2"
    assert str(file) == "https://host/a/b%20c%3F%23%25.tar" and repr(url) == "Url('https://host/a')"
    assert file.parent / "x" == url / "x" and url.parent.parent == url.parent
    told = without_secrets("see 'http://u:p@h/a?k=v' or (s3://k@b/c?x), why?")
    assert told == "see 'http://h/a' or (s3://b/c), why"


@pytest.mark.parametrize("url", ["nonsense://bucket/a", "hdfs3://bucket/a"])
def test_an_unknown_protocol_is_one_line(url: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(url)}: .*nonsense|hdfs3") as error:
        folder_at(locate(url))
    assert "\n" not in str(error.value)


def test_remote_errors_name_the_place_in_one_line(server: str) -> None:
    with pytest.raises(OSError, match=r"^s3://no-such-bucket/a/b: .*bucket does not exist") as error:
        folder_at(locate("s3://no-such-bucket/a")).write("b", b"")
    assert "\n" not in str(error.value)
    folder = folder_at(locate(f"{BUCKET}/refused"))
    folder.write("here", b"1")
    refusal = rf"^{BUCKET}/refused.*(Forbidden|AccessDenied|does not exist)"
    for act in (lambda: folder.write("a", b""), lambda: folder.read("here"), folder.sizes):
        with forbidden(server), pytest.raises(OSError, match=refusal) as error:
            act()
        assert "\n" not in str(error.value)


def test_http_errors_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a b#").write_bytes(b"12345")
    with faulty_server(tmp_path) as server:
        folder = folder_at(locate(server.url))
        assert folder.read("a b#") == b"12345" and folder.read_range("a b#", 1, 3) == b"234"
        with pytest.raises(FileNotFoundError, match=rf"^{server.url}/none: not found$"):
            folder.read("none")
        for status, kind, words in ((403, PermissionError, "refused .*credentials"), (503, OSError, "503")):
            server.status["a b#"] = status
            with pytest.raises(kind, match=rf"^{server.url}/a%20b%23: .*{words}"):
                folder.read("a b#")
        server.status.clear()
        server.ranges = False
        with pytest.raises(RangeIgnoredError, match="sends whole files") as error:
            folder.read_range("a b#", 1, 3)
        assert error.value.content == b"12345"


def test_a_name_that_no_service_knows() -> None:
    error = ConnectionError()
    error.__cause__ = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert type(_plain_error(error, Url("https://u:p@nowhere/a"))) is NoSuchHostError


def test_a_fork_has_a_client_of_its_own(server: str) -> None:
    folder = folder_at(locate(f"{BUCKET}/forked"))
    folder.write("file", b"12345")
    context = multiprocessing.get_context("fork")
    for method in (folder.read, pickle.loads(pickle.dumps(folder)).read):
        with context.Pool(1) as pool:
            assert pool.apply(method, ("file",)) == folder.read("file") == b"12345"
