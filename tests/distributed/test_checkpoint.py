"""Checkpoints move between strategies and world sizes, are complete or invisible, and are refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scaler.checkpoint import Checkpointer, complete_checkpoints, load_method, load_pieces, read_manifest, verify
from scaler.collectives import World
from tests.distributed.helper import run_distributed
from tests.runs import weights
from tests.tiny import Tiny, tiny_steps, tiny_strategy


def leg(world: World, name: str, folder: str, first: int, optimizer: str) -> list[float]:
    """Continue from the newest checkpoint, if any, for three steps, and save."""
    strategy = tiny_strategy(name, world, optimizer=optimizer)
    strategy.method.center += 3.25
    checkpointer = Checkpointer(Path(folder), world=world, keep_last=10)
    source = checkpointer.find()
    if source is not None:
        strategy.method.center.zero_()
        load_pieces(source, strategy.pieces())
        assert strategy.method.center.eq(3.25).all()
        # Saved again without a step, every tensor must be what it was, bit for bit.
        checkpointer.save(step=first + 500, pieces=strategy.pieces(), info={})
        checkpointer.wait()
        world.barrier()
        if world.rank == 0:
            again = Path(folder, "checkpoints", f"step-{first + 500:08d}")
            before, after = weights(source), weights(again)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before)
            shutil.rmtree(again)
        world.barrier()
    losses = tiny_steps(strategy, world, first=first, count=3)
    checkpointer.save(step=first + 3, pieces=strategy.pieces(), info={"images": 12 * (first + 3)})
    checkpointer.wait()
    world.barrier()
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_run_that_moves_between_strategies_and_sizes_follows_one_that_never_moved(tmp_path, optimizer):
    route = [("fsdp2", 2), ("ddp", 1), ("fsdp2", 3), ("ddp", 2), ("fsdp2", 1)]
    moved = []
    for i, (name, size) in enumerate(route):
        moved += run_distributed(leg, size, name, str(tmp_path), 3 * i, optimizer)[0]
    strategy = tiny_strategy("ddp", World(), optimizer=optimizer)
    stayed = tiny_steps(strategy, World(), first=0, count=15)
    assert moved == pytest.approx(stayed, rel=2e-6)
    path = complete_checkpoints(tmp_path / "checkpoints")[0]
    assert path.name == "step-00000015" and read_manifest(path)["images"] == 180
    # Names are the module's own, and the teacher is there.
    saved = weights(path)
    for name, tensor in strategy.method.state_dict().items():
        if name != "center":
            torch.testing.assert_close(saved[f"method/{name}"], tensor, rtol=1e-5, atol=1e-6)
    assert "method/teacher.blocks.0.up.weight" in saved


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run directory with two complete checkpoints of one process, steps 1 and 2."""
    strategy = tiny_strategy("ddp", World())
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=5)
    for step in (1, 2):
        tiny_steps(strategy, World(), first=step, count=1)
        checkpointer.save(step=step, pieces=strategy.pieces(), info={"images": 12 * step})
    checkpointer.wait()
    return tmp_path


def test_old_checkpoints_are_removed_but_for_the_multiples_to_keep(tmp_path):
    strategy = tiny_strategy("ddp", World())
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=2, keep_every=4)
    for step in range(1, 11):
        checkpointer.save(step=step, pieces=strategy.pieces(), info={})
    checkpointer.wait()
    assert [p.name[-2:] for p in complete_checkpoints(tmp_path / "checkpoints")] == ["10", "09", "08", "04"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "hole"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run_dir, damage, capsys):
    newest = run_dir / "checkpoints" / "step-00000002"
    data = next(newest.glob("rank-00000*.safetensors"))
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        os.truncate(data, data.stat().st_size - 100)
    elif damage == "remove":
        data.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, ')
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["images"] = 13
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="step-00000002"):
        verify(newest)
    found = Checkpointer(run_dir, world=World(), keep_last=5).find()
    assert found is not None and found.name == "step-00000001"
    assert "step-00000002 is damaged" in capsys.readouterr().out


def test_when_all_are_damaged_nothing_starts_from_scratch_in_silence(run_dir):
    for path in complete_checkpoints(run_dir / "checkpoints"):
        os.truncate(next(path.glob("rank-00000*.safetensors")), 10)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        Checkpointer(run_dir, world=World(), keep_last=5).find()


def test_ranges_with_holes_are_refused(run_dir):
    from scaler.checkpoint.manifest import _digest

    path = run_dir / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["tensors"]["method/student.head.weight"]["ranges"][0][0] = 5
    path.write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    with pytest.raises(ValueError, match="hole or overlap at element 0"):
        read_manifest(path.parent)


def test_another_architecture_is_refused_by_name(run_dir):
    class Wider(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(3, 3)

    class Other(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.student.head = torch.nn.Linear(41, 8)

    class Smaller(Tiny):
        def __init__(self) -> None:
            super().__init__()
            del self.teacher

    with pytest.raises(ValueError, match=r"lacks method/extra\.bias \(and 1 more\).*another architecture"):
        load_method(run_dir, Wider())
    with pytest.raises(ValueError, match=r"student.head.weight has shape \(7, 41\) .* \(8, 41\).*another architecture"):
        load_method(run_dir, Other())
    with pytest.raises(ValueError, match=r"teacher.*another architecture"):
        load_method(run_dir, Smaller())
    same = Tiny()
    assert load_method(run_dir, same)["images"] == 24
    assert torch.equal(same.state_dict()["teacher.head.bias"], weights(run_dir / "checkpoints" / "step-00000002")[
        "method/teacher.head.bias"])  # fmt: skip


def test_an_unfinished_checkpoint_is_invisible_and_cleared_away(run_dir):
    broken = run_dir / "checkpoints" / "step-00000003"
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", broken)
    (broken / "manifest.json").unlink()
    assert [p.name for p in complete_checkpoints(run_dir / "checkpoints")] == ["step-00000002", "step-00000001"]
    Checkpointer(run_dir, world=World(), keep_last=5)
    assert not broken.exists()


SAVE_FOREVER = """
import sys
from pathlib import Path
from scaler.checkpoint import Checkpointer
from scaler.collectives import World
from tests.runs import weights
from tests.tiny import tiny_strategy
strategy = tiny_strategy("ddp", World())
checkpointer = Checkpointer(Path(sys.argv[1]), world=World(), keep_last=3)
print("ready", flush=True)
for step in range(1, 100_000):
    checkpointer.save(step=step, pieces=strategy.pieces(), info={"images": step})
"""


def test_kill_9_while_saving_leaves_whole_checkpoints_only(tmp_path):
    for delay in (0.01, 0.05, 0.123, 0.2):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        while not complete_checkpoints(tmp_path / "checkpoints"):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        paths = complete_checkpoints(tmp_path / "checkpoints")
        assert paths
        for path in paths:
            verify(path)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a full disk is made by mounting one: root")
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        strategy = tiny_strategy("ddp", World())
        checkpointer = Checkpointer(mount, world=World(), keep_last=50)
        with pytest.raises(
            ValueError, match=r"could not save a checkpoint.*(No space left|StorageFull).*resumes from"
        ) as e:
            for step in range(1, 50):
                checkpointer.save(step=step, pieces=strategy.pieces(), info={})
                checkpointer.wait()
        paths = complete_checkpoints(mount / "checkpoints")
        assert paths and paths[0].name in str(e.value) and "\n" not in str(e.value)
        for path in paths:
            verify(path)
    finally:
        subprocess.run(["umount", mount], check=True)
