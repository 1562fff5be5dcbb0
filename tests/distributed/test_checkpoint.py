"""Checkpoints move between strategies and world sizes, are complete or invisible, and are refused when damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch

from scaler.checkpoint import Checkpointer, complete_checkpoints, load_method, load_pieces, read_manifest, verify
from scaler.collectives import World
from scaler.optimizers import build_optimizer
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import strategy_class
from tests.distributed.helper import run_distributed
from tests.long import only_long
from tests.runs import weights
from tests.s3 import BUCKET, forbidden, s3_server, use_s3
from tests.tiny import Tiny, tiny_steps, tiny_strategy


def leg(world: World, name: str, folder: str, first: int, optimizer: str, group: int | str = "all") -> list[float]:
    """Continue from the newest checkpoint, if any, for three steps, and save."""
    strategy = tiny_strategy(name, world, optimizer=optimizer, shard_group=group)
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


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=only_long), "lars"])
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
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=2, keep=lambda step: step % 4 == 0)
    for step in range(1, 11):
        checkpointer.save(step=step, pieces=strategy.pieces(), info={})
    checkpointer.wait()
    assert [p.name[-2:] for p in complete_checkpoints(tmp_path / "checkpoints")] == ["10", "09", "08", "04"]


def test_ranks_that_hold_the_same_share_its_writing(tmp_path):
    """Hybrid sharding on four ranks: two copies of each range."""
    run_distributed(leg, 4, "fsdp2", str(tmp_path), 0, "adamw", 2)
    path = complete_checkpoints(tmp_path / "checkpoints")[0]
    manifest = read_manifest(path)
    sizes = dict.fromkeys(manifest["files"], 0)
    for entry in manifest["tensors"].values():  # read_manifest has seen that nothing overlaps
        for start, stop, file in entry["ranges"]:
            sizes[file] += 4 * (stop - start)
    assert len(sizes) == 4 and max(sizes.values()) < 0.3 * sum(sizes.values())
    moved = leg(World(), "ddp", str(tmp_path), 3, "adamw")
    stayed = tiny_strategy("ddp", World())
    tiny_steps(stayed, World(), first=0, count=3)
    assert moved == pytest.approx(tiny_steps(stayed, World(), first=3, count=3), rel=2e-6)


class Wide(Tiny):
    """Tiny with 20 MB of weights more, in the student and in the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student.wide, self.teacher.wide = torch.nn.Linear(2048, 2501), torch.nn.Linear(2048, 2501)
        self.teacher.requires_grad_(False)


def memory(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def peak_growth(action) -> int:
    """Bytes by which this process's resident memory rises at most while `action` runs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def bytes_read(action) -> int:
    """Bytes that this process's read calls return while `action` runs."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    action()
    return count() - before


def weigh(world: World, folder: str) -> dict[str, int]:
    """Memory and reads of what a rank does with checkpoints under FSDP2."""
    settings = StrategySettings(name="fsdp2", precision="fp32")
    strategy = strategy_class("fsdp2")(
        settings, world=world, device=torch.device("cpu"), clip_norm=None, deterministic=True
    )
    method, optim = Wide(), Optim(lr=1e-2)
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    checkpointer = Checkpointer(Path(folder), world=world, keep_last=1)

    def save(step: int) -> None:
        checkpointer.save(step=step, pieces=strategy.pieces(), info={})
        checkpointer.wait()
        world.barrier()

    found = {"first save": peak_growth(lambda: save(1)), "second save": peak_growth(lambda: save(2))}
    found["hashed"] = bytes_read(checkpointer.find)
    path = complete_checkpoints(Path(folder, "checkpoints"))[0]
    found["loading"] = peak_growth(lambda: load_pieces(path, strategy.pieces()))
    found["loaded"] = bytes_read(lambda: load_pieces(path, strategy.pieces()))
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
def test_no_rank_holds_or_reads_more_than_its_part(tmp_path):
    ranks = run_distributed(weigh, 3, str(tmp_path))
    files = read_manifest(complete_checkpoints(tmp_path / "checkpoints")[0])["files"]
    sizes = [entry["bytes"] for entry in files.values()]
    total = sum(sizes)
    assert total > 80e6 and len(sizes) == 3 and max(sizes) < 0.36 * total
    for found in ranks:
        assert found["first save"] < 0.45 * total, found
        assert found["second save"] < 0.1 * total, "host memory is kept from save to save"
        assert found["hashed"] < 0.37 * total, "the ranks share the hashing"
        assert found["loading"] < 0.45 * total, found
        assert 0.3 * total < found["loaded"] < 0.37 * total, found


@pytest.fixture
def bucket():
    before = dict(os.environ)
    with s3_server() as endpoint:
        yield endpoint
    os.environ.clear()
    os.environ |= before


def remote_leg(world: World, name: str, endpoint: str, url: str, first: int) -> tuple[str | None, list[float]]:
    """Three steps from the newest checkpoint at a URL, if any, with a save after each."""
    use_s3(endpoint)
    strategy = tiny_strategy(name, world)
    checkpointer = Checkpointer(Path("nowhere"), world=world, keep_last=2, folder=url)
    source = checkpointer.find()
    if source is not None:
        load_pieces(source, strategy.pieces())
        assert checkpointer.named(url) == checkpointer.named(str(source)) == source
    losses = []
    for step in range(first, first + 3):
        losses += tiny_steps(strategy, world, first=step, count=1)
        checkpointer.save(step=step + 1, pieces=strategy.pieces(), info={})
    checkpointer.wait()
    world.barrier()
    return source and str(source), losses


def test_a_run_in_an_object_store_moves_between_layouts_and_leaves_nothing_behind(bucket):
    url = f"{BUCKET}/runs/first"
    files = fsspec.filesystem("s3")
    files.pipe(f"{url}/step-00000009/rank-00000-dead.safetensors", b"of an attempt that died")
    first = run_distributed(remote_leg, 2, "fsdp2", bucket, url, 0)
    second = run_distributed(remote_leg, 3, "ddp", bucket, url, 3)
    assert [first[0][0], second[2][0]] == [None, f"{url}/step-00000003"]
    stayed = tiny_steps(tiny_strategy("ddp", World()), World(), first=0, count=6)
    assert first[0][1] + second[0][1] == pytest.approx(stayed, rel=2e-6)
    assert [str(path) for path in complete_checkpoints(url)] == [f"{url}/step-00000006", f"{url}/step-00000005"]
    files.invalidate_cache()
    left = {f"s3://{name}" for name in files.find(url)}
    wanted = {f"{path}/manifest.json" for path in complete_checkpoints(url)}
    wanted |= {f"{path}/{file}" for path in complete_checkpoints(url) for file in read_manifest(path)["files"]}
    assert left == wanted and len(left) == 8
    # Damage is found there too, and the one before is used.
    damaged = f"{url}/step-00000006/{max(read_manifest(f'{url}/step-00000006')['files'])}"
    content = bytearray(files.cat(damaged))
    content[-5] ^= 4
    files.pipe(damaged, bytes(content))
    assert str(Checkpointer(Path("nowhere"), world=World(), keep_last=2, folder=url).find()) == f"{url}/step-00000005"


def test_a_store_that_refuses_is_one_line_with_what_is_left(bucket, tmp_path):
    strategy = tiny_strategy("ddp", World())
    url = f"{BUCKET}/run"
    checkpointer = Checkpointer(tmp_path, world=World(), keep_last=2, folder=url)
    checkpointer.save(step=1, pieces=strategy.pieces(), info={})
    checkpointer.wait()
    with forbidden(bucket):
        checkpointer.save(step=2, pieces=strategy.pieces(), info={})
        with pytest.raises(
            ValueError, match=rf"could not save .* {BUCKET}/run: {BUCKET}/run/step-00000002/rank.*"
        ) as e:
            checkpointer.wait()
        assert "cannot be read either" in str(e.value) and "\n" not in str(e.value)
        with pytest.raises(ValueError, match=f"cannot use the checkpoints in {BUCKET}/run: .*write-test"):
            Checkpointer(tmp_path, world=World(), keep_last=2, folder=url)
        with pytest.raises(ValueError, match=f"cannot use the checkpoints in {BUCKET}/run"):
            checkpointer.find()  # which says nothing of damage
    assert str(checkpointer.find()) == f"{url}/step-00000001"
    with pytest.raises(ValueError, match=r"cannot use the checkpoints in s3://no-such-bucket/run: .*does not exist"):
        Checkpointer(tmp_path, world=World(), keep_last=2, folder="s3://no-such-bucket/run")


def limited_on_rank_1(world: World, folder: str) -> str:
    """What a rank hears of a save that does not fit where rank 1 writes."""
    strategy = tiny_strategy("fsdp2", world)
    checkpointer = Checkpointer(Path(folder), world=world, keep_last=2)
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    world.barrier()
    checkpointer.save(step=1, pieces=strategy.pieces(), info={})
    try:
        checkpointer.wait()
    except ValueError as error:
        return str(error)
    finally:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "nothing"


def test_rank_0_does_not_wait_for_a_rank_that_cannot_write(tmp_path):
    zero, one = run_distributed(limited_on_rank_1, 2, str(tmp_path), timeout=60)
    assert "rank-00001" in zero
    for message in (zero, one):
        assert "File too large" in message and "there is no complete checkpoint yet" in message
    assert complete_checkpoints(tmp_path / "checkpoints") == []


def test_a_step_may_be_saved_again(run_dir):
    """After going back, by another process and then by the same one."""
    path = run_dir / "checkpoints" / "step-00000002"
    strategy = tiny_strategy("ddp", World())
    checkpointer = Checkpointer(run_dir, world=World(), keep_last=5)
    for images in (1, 2):
        before = read_manifest(path)["files"]
        checkpointer.save(step=2, pieces=strategy.pieces(), info={"images": images})
        checkpointer.wait()
        verify(path)
        manifest = read_manifest(path)
        assert manifest["images"] == images and not before.keys() & manifest["files"].keys()
        assert {p.name for p in path.iterdir()} == {"manifest.json", *manifest["files"]}


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
