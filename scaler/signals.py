"""Requests to stop: signals, and the death of the launcher, which not every launcher announces."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

_LAUNCHER = re.compile(r"(^|/)(torchrun|accelerate|deepspeed)(\.|$)|^torch\.distributed\.(run|launch)$")


class StopSignals:
    """While active, SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint and an orderly end instead of killing the process;
    a second SIGINT (Ctrl-C) ends it at once.

    What was received is kept when it is left and entered again.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}
        self._family = [psutil.Process(), *launchers()]

    @property
    def received(self) -> int:
        """The signal that asked to stop, or 0. A launcher that is gone counts as SIGTERM.

        The `deepspeed` command on one machine dies of its SIGTERM and says nothing to the processes below it.
        """
        if not self._number and self._orphaned():
            self._number = signal.SIGTERM
        return self._number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._receive)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after a checkpoint; Ctrl-C again stops at once\n")

    def _orphaned(self) -> bool:
        try:
            return any(child.ppid() != parent.pid for child, parent in itertools.pairwise(self._family))
        except psutil.Error:
            return True


def launchers() -> list[psutil.Process]:
    """The launcher's processes above this one, nearest first; none for a process that a person or a shell started."""
    found = []
    try:
        for parent in psutil.Process().parents():
            if not _LAUNCHER.search(_program(parent.cmdline())):
                break
            found.append(parent)
    except psutil.Error:  # one of them is ending right now
        pass
    return found


def _program(command_line: list[str]) -> str:
    """The program, or the script or module that Python runs."""
    words = iter(command_line)
    word = next(words, "")
    if "python" not in Path(word).name:
        return word
    for word in words:
        if word == "-m":
            return next(words, "")
        if not word.startswith("-"):
            return word
    return ""
