"""What is tried again, for how long, and what is not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from shards import retry as module
from shards.retry import patience, retry


def failing(*errors: Exception) -> Callable[[], int]:
    """A function that raises each error once, then returns how often it was called."""
    left, calls = list(errors), [0]

    def act() -> int:
        calls[0] += 1
        if left:
            raise left.pop(0)
        return calls[0]

    return act


def test_what_may_pass_is_tried_until_it_works() -> None:
    start, state = time.monotonic(), random.getstate()
    assert retry(failing(OSError("a"), ValueError("b"), TimeoutError("c"))) == 4
    assert 0.3 < time.monotonic() - start < 3, "it waits ever longer"
    assert random.getstate() == state, "with random numbers of its own"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience() == 300
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "0.5")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^cut \(tried for 0 s; SCALER_REMOTE_SECONDS sets") as error:
        retry(failing(*[ConnectionResetError("cut")] * 100))
    assert isinstance(error.value.__cause__, ConnectionResetError) and time.monotonic() - start < 1
    with pytest.raises(ValueError, match="tried for 0 s"):
        retry(failing(OSError("x")), seconds=0.0)


def test_wrong_content_is_asked_for_a_few_times() -> None:
    assert retry(failing(*[ValueError("wrong")] * 3)) == 4
    with pytest.raises(ValueError, match=r"^wrong$"):
        retry(failing(*[ValueError("wrong")] * 4))


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no")])
def test_what_no_waiting_helps(error: OSError) -> None:
    act = failing(error)
    with pytest.raises(ValueError, match=f"^{error}$") as found:
        retry(act)
    assert found.value.__cause__ is error and act() == 2
    with pytest.raises(ValueError, match=r"^odd$"):
        retry(failing(ConnectionError("odd")), final=(ConnectionError,))


def test_a_long_silence_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE", 0.05)
    retry(failing(*[OSError("http://a: cut")] * 3), seconds=60)
    assert capsys.readouterr().err == "warning: http://a: cut; trying again for up to 60 s\n"
