"""The notebook profile: JupyterLab started with its own configuration by its own user, and attacked."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.launch.container.image import Container, Service, listening
from tests.launch.container.root import OUTER

PORT = 8888
TOKEN = "0123456789abcdef0123456789abcdef-_ABC"
HERE = f"http://127.0.0.1:{PORT}"
EVIL = "http://evil.example"
SHUT = {302, 403, 404}  # to the login page; forbidden; what is asked for from elsewhere does not exist
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
}

# What the user's own folder, or one that others can write to, would have Jupyter do.
OPEN = json.dumps({"IdentityProvider": {"token": ""}, "ServerApp": {"ip": "0.0.0.0", "allow_origin": "*", "token": ""}})


@pytest.fixture(scope="module")
def server(box: Container) -> Iterator[tuple[Container, Service]]:
    script = "mkdir -p .jupyter .ipython .local/etc/jupyter\n" + "".join(
        f"echo '{OPEN}' > {folder}/{name}.json\n"
        for folder in (".jupyter", ".local/etc/jupyter", "/runs")
        for name in ("jupyter_server_config", "jupyter_config")
    )
    assert box.root.run(["sh", "-ec", script], user=box.user, folder="/home/scaler").returncode == 0
    box.secret("notebook_token", f"{TOKEN}\n")
    with box.service("notebook", port=PORT) as service:
        yield box, service


@dataclass
class Answer:
    status: int
    body: str
    cookies: dict[str, str] = field(default_factory=dict)
    attributes: list[str] = field(default_factory=list)


def ask(box: Container, path: str, *, method: str = "GET", body: str | None = None, **headers: str) -> Answer:
    """One request from within the container's network; `_` in a header's name is `-`."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.sock = box.root.connect("127.0.0.1", PORT)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = "" if response.status == 101 else response.read().decode(errors="replace")
    given = response.headers.get_all("Set-Cookie") or []
    connection.close()
    return Answer(response.status, text, dict(one.split(";")[0].split("=", 1) for one in given), given)


def login(box: Container) -> Answer:
    return ask(box, f"/api/status?token={TOKEN}")


def cookie(answer: Answer) -> str:
    return "; ".join(f"{name}={value}" for name, value in answer.cookies.items())


def test_the_right_token_opens_it(server: tuple[Container, Service]) -> None:
    box, _ = server
    for answer in (login(box), ask(box, "/api/status", Authorization=f"token {TOKEN}")):
        assert answer.status == 200 and json.loads(answer.body)["kernels"] == 0
    session = login(box)
    assert ask(box, "/lab", Cookie=cookie(session)).status == 200
    assert ask(box, "/api/contents/first_run.ipynb", Cookie=cookie(session)).status == 200, "the shipped notebook"
    (identity,) = (line for line in session.attributes if line.startswith("username-"))
    assert "HttpOnly" in identity and "SameSite=Strict" in identity


@pytest.mark.parametrize(
    "path",
    [
        "/api/status",
        "/api/contents",
        "/api/kernels",
        "/api/terminals",
        "/files/x",
        "/lab",
        "/tree",
        "/api/me",
        "/metrics",
    ],
)
def test_without_the_token_everything_is_shut(server: tuple[Container, Service], path: str) -> None:
    box, _ = server
    words = ["", "?token=", f"?token={TOKEN[:-1]}", f"?token={TOKEN}x", f"?token={TOKEN.lower()}"]
    headers = [{"Authorization": value} for value in ("token", "token ", "token null", f"Basic {TOKEN}")]
    headers.append({"Cookie": 'username-127-0-0-1-8888="2|1:0|10:0|23:username-127-0-0-1-8888|0:|0"'})
    answers = [ask(box, f"{path}{word}") for word in words] + [ask(box, path, **header) for header in headers]
    assert {answer.status for answer in answers} <= SHUT, answers
    if path.startswith("/api"):
        assert {answer.status for answer in answers} == {403}
    for answer in answers:
        assert TOKEN not in answer.body


def test_nothing_is_started_without_the_token(server: tuple[Container, Service]) -> None:
    box, _ = server
    session = login(box)
    for path in ("/api/kernels", "/api/terminals", "/api/sessions", "/api/shutdown"):
        assert ask(box, path, method="POST", body="{}").status == 403
        # From another page in the user's browser, which has his cookie but cannot read it.
        assert ask(box, path, method="POST", body="{}", Cookie=cookie(session), Origin=EVIL).status in SHUT
        assert ask(box, path, method="POST", body="{}", Cookie=cookie(session)).status == 403
    assert (
        ask(box, "/login", method="POST", body="password=", Content_Type="application/x-www-form-urlencoded").status
        == 403
    )
    assert json.loads(login(box).body)["kernels"] == 0


def test_websockets_are_for_its_own_pages(server: tuple[Container, Service]) -> None:
    box, _ = server
    session = cookie(login(box))
    terminal = ask(box, "/api/terminals", method="POST", body="{}", Authorization=f"token {TOKEN}")
    for path in ("/api/events/subscribe", f"/terminals/websocket/{json.loads(terminal.body)['name']}"):
        assert ask(box, path, Origin=HERE, **UPGRADE).status in SHUT
        assert ask(box, path, Origin=EVIL, Cookie=session, **UPGRADE).status == 403
        assert ask(box, path, Origin="null", Cookie=session, **UPGRADE).status == 403
        assert ask(box, path, Origin=HERE, Cookie=session, **UPGRADE).status == 101


def test_other_names_for_it_are_refused(server: tuple[Container, Service]) -> None:
    box, _ = server
    assert ask(box, f"/api/status?token={TOKEN}", Host="evil.example").status == 403, "a name that was rebound"
    assert ask(box, f"/api/status?token={TOKEN}", Host=f"localhost:{PORT}").status == 200


def test_it_listens_on_loopback(server: tuple[Container, Service]) -> None:
    box, _ = server
    assert listening(box.root) == {PORT: ["127.0.0.1"]}
    with pytest.raises(ConnectionRefusedError):
        box.root.connect(OUTER, PORT)


def test_a_kernel_works_and_is_not_spoken_to_over_the_network(server: tuple[Container, Service]) -> None:
    box, _ = server
    token = {"Authorization": f"token {TOKEN}"}
    kernel = json.loads(ask(box, "/api/kernels", method="POST", body="{}", **token).body)["id"]
    with box.root.connect("127.0.0.1", PORT) as page:  # the server asks a kernel how it is when a page is there
        headers = {"Host": f"127.0.0.1:{PORT}", **token, **{k.replace("_", "-"): v for k, v in UPGRADE.items()}}
        lines = [
            f"GET /api/kernels/{kernel}/channels HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        page.sendall("\r\n".join([*lines, "", ""]).encode())
        assert b" 101 " in page.recv(100)
        deadline = time.monotonic() + 60
        while (state := json.loads(ask(box, f"/api/kernels/{kernel}", **token).body)["execution_state"]) != "idle":
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        connection = next(box.root.path("/home/scaler/.local/share/jupyter/runtime").glob(f"kernel-{kernel}.json"))
        assert json.loads(connection.read_text())["transport"] == "ipc" and connection.stat().st_mode & 0o077 == 0
    assert ask(box, f"/api/kernels/{kernel}", method="DELETE", **token).status == 204


def test_the_token_is_out_of_reach(server: tuple[Container, Service]) -> None:
    box, service = server
    assert service.log is not None and TOKEN not in service.log.read_text()
    # Everything that another user of the container can read: command lines, variables, files; without -xdev also the
    # gigabytes of a checkout under /tmp.
    script = "cat /proc/[0-9]*/cmdline; cat /proc/[0-9]*/environ; find /tmp /home /runs -xdev -type f -exec cat {} +"
    seen = box.root.run(["sh", "-c", script], user="nobody")
    assert "jupyter" in seen.stdout and "Permission denied" in seen.stderr
    assert TOKEN not in seen.stdout
    # Nor is it in variables that `docker inspect` or the user's own programs would pass on.
    own = box.root.run(["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ"], user=box.user)
    assert "JUPYTER_TOKEN_FILE" in own.stdout and TOKEN not in own.stdout


@pytest.mark.parametrize(
    ("token", "variables", "words"),
    [
        ("short", {}, "needs 32 or more"),
        ("", {}, "needs 32 or more"),
        ("spaces are not allowed in a token of ours", {}, "needs 32 or more"),
        (TOKEN, {"JUPYTER_TOKEN": TOKEN}, "shows in `docker inspect`"),
        (TOKEN, {"JUPYTER_TOKEN": ""}, "shows in `docker inspect`"),
    ],
)
def test_a_weak_token_is_refused(
    server: tuple[Container, Service], token: str, variables: dict[str, str], words: str
) -> None:
    box, _ = server
    box.secret("notebook_token", token)
    result = box.run("notebook", **variables)
    box.secret("notebook_token", TOKEN)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_token_of_its_own_is_shown_once_and_works(server: tuple[Container, Service]) -> None:
    box, _ = server
    (secret := box.root.path("/run/secrets/notebook_token")).rename(secret.with_name("aside"))
    found = []
    for _ in range(2):
        process = subprocess.Popen(
            box.command("notebook"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        service = Service(process)
        assert process.stdout is not None
        found += re.findall(r"http://127\.0\.0\.1:8888/lab\?token=([\w-]{43,})\n", process.stdout.readline())
        service.stop()
        assert found[-1] not in process.stdout.read()
    secret.with_name("aside").rename(secret)
    assert len(set(found)) == 2
