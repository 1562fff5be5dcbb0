"""Runs a command on each of several hosts over ssh, as if they were one process here.

    code = run_on_hosts({"node-1": [...], "node-2": [...]}, folder="/shared/work", processes=8)

Lines come back with the host's name before them, signals are passed on, the first host that fails ends the others, and
nothing stays behind on a host, also when this process or the network dies: there the command runs below

    python -m launch.remote --processes 8 -- COMMAND …

which listens on its standard input. One byte there is a signal's number for the command, 0 is a sign of life, and the
end of file or too long a silence means that nobody waits any more. It relays the output, so that a training that is
being stopped can still write to it while it saves its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

from launch.local import environment, signals_to

_BEAT = 10.0  # seconds between signs of life
_SILENCE = 60.0  # seconds without one after which a host stops its command
_GRACE = 60.0  # seconds from a SIGTERM to a SIGKILL; torchrun gives its processes 30 of them
_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
_CONNECTION_LOST = 255  # ssh's own exit code
_PR_SET_CHILD_SUBREAPER = 36


def run_on_hosts(
    commands: Mapping[str, Sequence[str]], *, folder: str, processes: int, min_hosts: int | None = None
) -> int:
    """Run `commands` (host → command) in `folder` of each host, all at once, and wait for all of them.

    Args:
        commands: by the name under which ssh reaches the host.
        folder: where they start; must exist on every host, with the same interpreter as here.
        processes: that each host will run, which share out its cores.
        min_hosts: how many hosts are enough to go on when others fail; None: all.

    Returns:
        0, or the exit code of the first host that was one too few.
    """
    running = {host: _start(host, words, folder=folder, processes=processes) for host, words in commands.items()}
    lines = threading.Lock()
    readers = [threading.Thread(target=_print_lines, args=(host, child, lines)) for host, child in running.items()]
    signals: list[int] = []
    failed: list[int] = []
    stopping, deadline, last_beat = False, float("inf"), float("-inf")
    with signals_to(signals.append):
        for reader in readers:
            reader.start()
        while running:
            for host in [host for host, child in running.items() if child.poll() is not None]:
                if code := abs(running.pop(host).returncode):
                    failed.append(code)
                    _explain(host, code, lines)
            if deadline == float("inf") and len(commands) - len(failed) < (min_hosts or len(commands)):
                deadline = time.monotonic() + _GRACE + _BEAT
                if not stopping:  # a second signal would cut short what torchrun does on the first
                    signals.append(signal.SIGTERM)
            if time.monotonic() > deadline:
                for child in running.values():
                    child.kill()
            sent = bytes(signals)
            del signals[: len(sent)]
            stopping = stopping or bool(sent)
            if sent or time.monotonic() - last_beat > _BEAT:
                last_beat = time.monotonic()
                for child in running.values():
                    _tell(child, sent or b"\0")
            time.sleep(0.1)
    for reader in readers:
        reader.join()
    tolerated = len(commands) - (min_hosts or len(commands))
    return failed[tolerated] if len(failed) > tolerated else 0


def _start(host: str, command: Sequence[str], *, folder: str, processes: int) -> subprocess.Popen[bytes]:
    below = [sys.executable, "-m", "launch.remote", "--processes", str(processes), "--", *command]
    line = f"cd {shlex.quote(folder)} && exec {shlex.join(below)}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*_SSH, host, line], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    )


def _print_lines(host: str, child: subprocess.Popen[bytes], lock: threading.Lock) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        with lock:
            sys.stdout.buffer.write(f"{host}: ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.flush()


def _explain(host: str, code: int, lock: threading.Lock) -> None:
    with lock:
        reason = "connection lost (ssh ended with 255)" if code == _CONNECTION_LOST else f"ended with exit code {code}"
        print(f"{host}: {reason}", flush=True)


def _tell(child: subprocess.Popen[bytes], words: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended
        child.stdin.write(words)
        child.stdin.flush()


# ---------------------------------------------------------------------- on the host itself


def supervise(command: Sequence[str], *, processes: int) -> int:
    """Run `command` until it ends or standard input says so; leave none of its descendants behind.

    Returns:
        Its exit code, 128 + n if signal n ended it.
    """
    if sys.platform == "linux":  # orphans below come to this process, which can so find and end them
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(
        command,
        env=environment(processes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    relay = threading.Thread(target=_relay, args=(child,), daemon=True)
    relay.start()
    try:
        with signals_to(child.send_signal):
            _obey(child)
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)
    finally:
        _kill_descendants()
    relay.join(timeout=5)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _obey(child: subprocess.Popen[bytes]) -> None:
    """Pass on signals from standard input until the child ends or nobody is there any more."""
    heard = time.monotonic()
    while child.poll() is None and time.monotonic() - heard < _SILENCE:
        if not select.select([0], [], [], 0.2)[0]:
            continue
        words = os.read(0, 4096)
        if not words:
            return
        heard = time.monotonic()
        for number in filter(None, words):
            child.send_signal(number)


def _relay(child: subprocess.Popen[bytes]) -> None:
    """Copy the child's output to ours as long as somebody reads it, and swallow it afterwards."""
    assert child.stdout is not None
    connected = True
    while words := os.read(child.stdout.fileno(), 65536):
        while connected and words:
            try:
                words = words[os.write(1, words) :]
            except OSError:
                connected = False


def _kill_descendants() -> None:
    while below := psutil.Process().children(recursive=True):
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=5)


def main() -> int:
    """`python -m launch.remote --processes N -- COMMAND …`."""
    option, processes, dashes, *command = sys.argv[1:]
    assert (option, dashes) == ("--processes", "--"), sys.argv
    return supervise(command, processes=int(processes))


if __name__ == "__main__":
    sys.exit(main())
