"""The ssh profile, started with its own configuration by its own user, and attacked."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.launch.container.image import Container, container, listening
from tests.launch.container.root import OUTER

PORT = 2222
PLACE = "/home/scaler/.sshd"


@pytest.fixture(scope="module")
def server(box: Container) -> Iterator[Container]:
    prepare(box)
    with box.service("ssh", port=PORT, NCCL_SOCKET_IFNAME="eth0, eth1", SECRET="1"):
        yield box


def prepare(box: Container) -> None:
    """Keys in /tmp: `good` may log in, `other` may not. What else could let somebody in is laid out as well."""
    for name in ("good", "other"):
        box.root.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"/tmp/{name}"])
    box.secret("authorized_keys", box.root.path("/tmp/good.pub").read_text())
    other = box.root.path("/tmp/other.pub").read_text().strip()
    home = {"authorized_keys": other, "environment": "EVIL=1", "rc": "touch /tmp/rc-was-run"}
    script = "mkdir -p .ssh\n" + "".join(f"echo '{text}' > .ssh/{name}\n" for name, text in home.items())
    assert box.root.run(["sh", "-ec", script], user=box.user, folder="/home/scaler").returncode == 0


def ssh(
    box: Container, *words: str, user: str = "scaler", key: str = "good", address: str = "127.0.0.1"
) -> subprocess.CompletedProcess[str]:
    """A client with one key, which has the last word run there."""
    options = {
        "IdentityFile": f"/tmp/{key}",
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/tmp/known_hosts",
        "ExitOnForwardFailure": "yes",
        "ConnectTimeout": "5",
    }
    command = ["ssh", "-p", str(PORT), *(f"-o{name}={value}" for name, value in options.items())]
    return box.root.run([*command, *words[:-1], f"{user}@{address}", *words[-1:]], timeout=20)


def test_the_right_key_finds_what_the_image_has(server: Container) -> None:
    script = (
        'id -un; command -v scaler; echo "$NCCL_SOCKET_IFNAME,$SECRET,$EVIL,$LC_ALL"\n'
        'sed -n "s/CapBnd:.//p" /proc/self/status\n'
        "touch /home/scaler/kept && ! touch /etc/kept 2>/dev/null && echo read-only"
    )
    result = ssh(server, "-oSetEnv=LC_ALL=C LD_PRELOAD=/tmp/evil.so", script)
    wanted = ["scaler", "/opt/scaler/bin/scaler", "eth0, eth1,,,", "0" * 16, "read-only"]
    assert result.stdout.splitlines() == wanted, result.stderr
    assert not server.root.path("/tmp/rc-was-run").exists()


@pytest.mark.parametrize("user", ["scaler", "root"])
def test_every_other_way_in_is_shut(server: Container, user: str) -> None:
    passwords = ["-oPubkeyAuthentication=no", "-oPreferredAuthentications=password,keyboard-interactive,none"]
    for options, key in ([], "other"), (passwords, "good"):
        result = ssh(server, *options, "id", user=user, key=key)
        assert (result.returncode, result.stdout) == (255, "")
        assert "Permission denied (publickey)." in result.stderr, "the server offers nothing but keys"


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_nobody_else_gets_in_with_a_valid_key(server: Container, user: str) -> None:
    result = ssh(server, "id", user=user)
    assert (result.returncode, result.stdout) == (255, "") and "Permission denied" in result.stderr


def test_only_loopback_is_reached_through_it(server: Container) -> None:
    assert ssh(server, "-W", f"127.0.0.1:{PORT}", "").stdout.startswith("SSH-2.0-")
    beyond = ssh(server, "-W", f"{OUTER}:{PORT}", "")
    assert beyond.returncode == 255 and "administratively prohibited" in beyond.stderr
    for there in ("9999", "/tmp/socket"):
        back = ssh(server, "-R", f"{there}:127.0.0.1:{PORT}", "id")
        assert (back.returncode, back.stdout) == (255, "") and "forwarding failed" in back.stderr
    assert ssh(server, "-A", "-X", 'echo "$SSH_AUTH_SOCK,$DISPLAY"').stdout == ",\n"


def test_it_listens_on_loopback_with_a_private_key(server: Container) -> None:
    assert listening(server.root) == {PORT: ["127.0.0.1"]}
    assert "Connection refused" in ssh(server, "id", address=OUTER).stderr
    key = server.root.path(f"{PLACE}/host_key")
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("keys", "words"), [("", "nobody could log in"), ("not a key\n", "holds no public key")])
def test_without_a_key_it_does_not_start(server: Container, keys: str, words: str) -> None:
    before = server.root.path("/run/secrets/authorized_keys").read_text()
    server.secret("authorized_keys", keys)
    result = server.run("ssh")
    server.secret("authorized_keys", before)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_each_volume_has_its_own_host_key_and_sigterm_ends_it(server: Container) -> None:
    keys = {server.root.path(f"{PLACE}/host_key").read_bytes()}
    with container() as box:
        prepare(box)
        for _ in range(2):
            with box.service("ssh", port=PORT, SCALER_ADDRESS="0.0.0.0") as service:
                assert listening(box.root) == {PORT: ["0.0.0.0"]}
                assert ssh(box, "id -un", address=OUTER).stdout == "scaler\n"
                keys.add(box.root.path(f"{PLACE}/host_key").read_bytes())
                assert service.stop() == 0
                assert service.log is not None and "Received signal 15; terminating" in service.log.read_text()
    assert len(keys) == 2
