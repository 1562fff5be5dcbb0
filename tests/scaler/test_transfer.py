"""Tensors that are sent to the device: themselves on a CPU, and packed without a byte astray for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaler.transfer import pack, send, send_together, unpack


def several() -> list[Tensor]:
    return [
        torch.arange(5) - 2,
        torch.tensor([True, False, True]),
        torch.empty(0),
        torch.rand(2, 3, 1),
        torch.tensor(7.5, dtype=torch.float64),
        torch.arange(9, dtype=torch.uint8).view(3, 3).T,
    ]


def test_on_a_cpu_they_stay_what_they_are() -> None:
    tensors, cpu = several(), torch.device("cpu")
    assert send(tensors[0], cpu) is tensors[0]
    assert all(a is b for a, b in zip(send_together(tensors, cpu), tensors, strict=True))


def test_what_is_packed_comes_out_again() -> None:
    tensors = several()
    packed = pack(tensors, pin=False)
    assert packed.dtype == torch.uint8 and packed.ndim == 1 and len(packed) <= sum(t.nbytes + 16 for t in tensors)
    for tensor, found in zip(tensors, unpack(packed, tensors), strict=True):
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_same_values() -> None:
    cuda = torch.device("cuda", 0)
    tensors = several()
    for tensor, found in zip(tensors, send_together(tensors, cuda), strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), tensor)
    assert send(torch.arange(3), cuda).tolist() == [0, 1, 2]
