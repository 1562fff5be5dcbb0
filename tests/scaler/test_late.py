"""Flags of the device come to the host in order, once each, and on a GPU without anybody waiting for them."""

from __future__ import annotations

import pytest
import torch

from scaler.late import Late


def test_flags_of_a_cpu_are_known_at_once_and_told_once() -> None:
    late = Late(torch.device("cpu"))
    for step, flag in enumerate((False, True, False), start=1):
        late.put(step, torch.tensor(flag))
    assert late.known() == [(1, False), (2, True), (3, False)]
    assert late.known() == [] == late.wait()
    late.put(4, torch.tensor(True))
    assert late.wait() == [(4, True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flags_of_a_busy_gpu_come_when_it_has_got_there() -> None:
    late, x = Late(torch.device("cuda")), torch.ones(8192, 8192, device="cuda")
    for _ in range(50):
        x = (x @ x).clamp_(0, 1)
    late.put(1, x[0, 0] > 0)
    assert late.known() == [], "the products take longer than their launch"
    assert late.wait() == [(1, True)]
