"""`scaler checkpoint show, verify, convert` on real checkpoints, and what other programs read of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scaler.checkpoint import Checkpointer, load_method, load_pieces, read_manifest, resolve_checkpoint, verify
from scaler.collectives import World
from tests.runs import weights
from tests.scaler.test_cli import scaler
from tests.tiny import Tiny, tiny_steps, tiny_strategy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of two steps."""
    run = tmp_path_factory.mktemp("tools") / "run"
    strategy = tiny_strategy("ddp", World())
    tiny_steps(strategy, World(), first=0, count=2)
    checkpointer = Checkpointer(run, world=World(), keep_last=1)
    info = {"images": 24, "fingerprint": "f", "recipe": {}, "saved_by": {"strategy": "ddp", "ranks": 1}}
    checkpointer.save(step=2, pieces=strategy.pieces(), info=info)
    checkpointer.wait()
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("command", ["show", "verify", "convert"])
def test_help_has_an_example(command: str) -> None:
    result = scaler("checkpoint", command, "--help")
    assert result.returncode == 0 and f"Example: scaler checkpoint {command}" in result.stdout.replace("\n ", "")


def test_show_says_what_is_in_it(run: Path) -> None:
    facts = json.loads(scaler("checkpoint", "show", run, "--json").stdout)
    strategy = tiny_strategy("ddp", World())
    size = {
        part: sum(p.data.numel() * p.data.itemsize for n, p in strategy.pieces().items() if n.startswith(start))
        for part, start in (("all", ""), ("teacher", "method/teacher"), ("optimizer", "optimizer/"))
    }
    size["method"] = size.pop("all") - size["teacher"] - size["optimizer"]
    assert facts["bytes"] == size and all(size.values())
    assert (facts["step"], facts["images"], facts["files"]) == (2, 24, 1)
    assert facts["saved_by"] == {"strategy": "ddp", "ranks": 1} and "tensors" not in facts
    assert facts["checkpoint"].endswith("step-00000002")
    text = scaler("checkpoint", "show", run, "--tensors").stdout
    assert "strategy ddp, ranks 1" in text and "method/student.head.weight\tfloat32\t7x41\n" in text
    listed = json.loads(scaler("checkpoint", "show", run, "--tensors", "--json").stdout)["tensors"]
    assert listed["method/teacher.head.bias"] == {"dtype": "float32", "shape": [7], "bytes": 28, "ranges": 1}


def test_verify_names_every_problem(run: Path) -> None:
    whole = scaler("checkpoint", "verify", run)
    assert whole.returncode == 0 and whole.stdout.endswith("is whole\n")
    assert scaler("checkpoint", "convert", run, run / "copy", "--files", 4).returncode == 0
    for number, damage in enumerate(("flip", "cut", "remove")):
        file = run / "copy" / f"part-{number:05d}-of-00004.safetensors"
        if damage == "flip":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        elif damage == "cut":
            os.truncate(file, file.stat().st_size - 1)
        else:
            file.unlink()
    result = scaler("checkpoint", "verify", run / "copy")
    assert result.returncode == 1 and not result.stdout
    flipped, cut, removed = result.stderr.splitlines()
    assert "00000-of-00004" in flipped and "another sha256" in flipped
    assert "00001-of-00004" in cut and "bytes instead of" in cut
    assert "00002-of-00004" in removed and removed.endswith("is missing")
    assert len(json.loads(scaler("checkpoint", "verify", run / "copy", "--json").stdout)["problems"]) == 3
    with pytest.raises(ValueError, match="00000-of-00004"):
        verify(run / "copy")
    refused = scaler("checkpoint", "convert", run / "copy", run / "again")
    assert refused.returncode == 1 and "another sha256" in refused.stderr and not (run / "again").exists()


@pytest.mark.parametrize("count", [None, 1, 3, 50])
def test_a_rewritten_checkpoint_loads_identically(run: Path, count: int | None) -> None:
    words = [] if count is None else ["--files", count]
    assert scaler("checkpoint", "convert", run, run / "copy", *words).returncode == 0
    before, after = read_manifest(resolve_checkpoint(run)), read_manifest(run / "copy")
    assert {k: v for k, v in before.items() if k not in ("files", "tensors")} == {
        k: v for k, v in after.items() if k not in ("files", "tensors")
    }
    assert len(after["files"]) == (count or 1)
    if count == 50:
        assert max(len(e["ranges"]) for e in after["tensors"].values()) > 1, "some tensor must be in several files"
        sizes = [f["bytes"] for f in after["files"].values()]
        assert max(sizes) < 3 * sum(sizes) / 50
    one, two = weights(resolve_checkpoint(run)), weights(run / "copy")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    strategy = tiny_strategy("ddp", World())
    assert not torch.equal(strategy.pieces()["method/student.head.bias"].data, one["method/student.head.bias"])
    load_pieces(run / "copy", strategy.pieces())
    for name, piece in strategy.pieces().items():
        assert torch.equal(piece.data, one[name].view(-1)), name


def test_one_plain_file_is_the_state_dict(run: Path) -> None:
    same = Tiny()
    load_method(run, same)
    state = same.state_dict()
    result = scaler("checkpoint", "convert", run, run / "model.safetensors", "--json")
    assert json.loads(result.stdout)["tensors"] == len(state)
    plain = load_file(run / "model.safetensors")
    assert plain.keys() == state.keys()
    assert all(torch.equal(plain[k], state[k]) and plain[k].shape == state[k].shape for k in state)
    with safe_open(run / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "2", "images": "24"}


@pytest.mark.parametrize(
    ("words", "prefix"),
    [
        (["--part", "teacher"], "method/teacher."),
        (["--part", "student", "--prefix", "student."], "method/student."),
        (["--prefix", "teacher.blocks.1."], "method/teacher.blocks.1."),
        (["--part", "all"], ""),
        (["--part", "all", "--prefix", "optimizer/"], "optimizer/"),
    ],
)
def test_parts_and_prefixes(run: Path, words: list[str], prefix: str) -> None:
    whole = weights(resolve_checkpoint(run))
    cut = len(prefix) if "--prefix" in words else len("method/") if prefix else 0
    expected = {name[cut:]: tensor for name, tensor in whole.items() if name.startswith(prefix)}
    assert scaler("checkpoint", "convert", run, run / "part.safetensors", *words).returncode == 0
    got = load_file(run / "part.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "RUN/nothing"], "no checkpoint"),
        (["verify", "s3x://bucket/run"], "s3x"),
        (["convert", "RUN", "RUN/m.safetensors", "--prefix", "encoder."], "consists of center, student, teacher"),
        (["convert", "RUN", "RUN/m.safetensors", "--files", "2"], "one file, not 2"),
        (["convert", "RUN", "RUN/copy", "--part", "teacher"], "becomes a whole checkpoint"),
        (["convert", "RUN", "RUN/checkpoints/step-00000002"], "is a checkpoint already"),
    ],
)
def test_errors_are_one_line(run: Path, words: list[str], message: str) -> None:
    result = scaler("checkpoint", *[word.replace("RUN", str(run)) for word in words])
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr and not result.stdout
