"""What is saved is the state at the moment of the call, whatever the training does next; failures are heard of."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from scaler.checkpoint import Checkpointer, complete_checkpoints, load_pieces, verify
from scaler.collectives import World
from scaler.strategies.base import Piece

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def piece(tensor: torch.Tensor) -> Piece:
    return Piece(tensor.view(-1), 0, tuple(tensor.shape), copy=0, copies=1)


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_the_state_is_that_of_the_call_and_the_training_goes_on_at_once(tmp_path: Path, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "method/large": torch.randn(10, 1_000_003, generator=generator),  # 40 MB
        "method/count": torch.tensor(3),
        "method/half": torch.randn(7, generator=generator).bfloat16(),
        "method/none": torch.empty(0, 5),
    }
    live = {name: tensor.to(device, copy=True) for name, tensor in values.items()}
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=5)
    for step in (1, 2):  # into fresh buffers, and into used ones
        checkpointer.save(step=step, pieces={n: piece(t) for n, t in live.items()}, info={})
        assert checkpointer.saving, "hashing 40 MB takes longer than returning from here"
        for tensor in live.values():
            tensor.add_(1)
    checkpointer.wait()
    assert not checkpointer.saving
    for back, path in enumerate(complete_checkpoints(tmp_path / "checkpoints")):
        verify(path)
        loaded = {name: torch.zeros_like(tensor, device=device) for name, tensor in values.items()}
        load_pieces(path, {name: piece(tensor) for name, tensor in loaded.items()})
        for name, tensor in values.items():
            wanted = tensor if back == 1 else tensor + 1
            assert torch.equal(loaded[name].cpu(), wanted), (name, path)


def test_a_bug_in_the_background_is_heard_of_too(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=5)
    checkpointer.save(step=1, pieces={"method/a": piece(torch.ones(3))}, info={"recipe": object()})
    deadline = time.monotonic() + 30
    while checkpointer.saving and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ValueError, match=r"could not save .*TypeError: .*object.*no complete checkpoint yet"):
        checkpointer.check()
    checkpointer.check()  # said once
    assert complete_checkpoints(tmp_path / "checkpoints") == []


def test_a_file_in_the_way_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(
        ValueError, match=r"cannot use the checkpoints in .*checkpoints: .*(File exists|Not a directory)"
    ):
        Checkpointer(tmp_path, world=World(), keep_last=5)
