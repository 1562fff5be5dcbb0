"""Every command of the README, run exactly as it stands there, in its order, in one fresh folder.

A few things make that possible in minutes on a small machine, and none of them changes a command: recipes of the names
that the README uses lie in the folder (a path goes before a name), the real ones with smaller numbers; so do small
photos; `s3://bucket` is a server here; `hosts` are namespaces of this machine; pretrained weights are in the hub's
cache, but random; and `scaler` is forked from a process that has imported torch (tests/warm.py), but for commands that
go over hosts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from scaler.export.original import original_names
from scaler.recipe import find_recipe
from tests.hosts import TestHost, hosts
from tests.images import make_image_folder
from tests.long import LONG
from tests.s3 import s3_server
from tests.warm import warm_scaler

ROOT = Path(__file__).parents[1]
CLASSES = 37  # as the README says
SLOW = ("make demo",)  # minutes
ITSELF = ("make test", "make venv")


def commands(text: str) -> list[str]:
    """The commands of all blocks of shell in a Markdown text; lines that a backslash continues are one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = commands((ROOT / "README.md").read_text())


def smaller(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe that runs in seconds and is otherwise what it was."""
    method = values["method"]
    large = "large" in method["backbone"]  # which the README plans for 64 GPUs
    patch = 14 if "patch14" in method["backbone"] else 16
    if method["backbone"].startswith("resnet"):
        method["backbone"] = "test_resnet"
    else:
        method |= {"depth": 2, "embed_dim": 48, "num_heads": 3, "group_size": 2}
    if method["name"] == "dinov2":
        method |= {"num_local_crops": 2, "local_size": 2 * patch, "num_prototypes": 64, "head_hidden": 48}
        method |= {"head_bottleneck": 24, "teacher_temperature_warmup": "2 steps", "freeze_last_layer": "1 steps"}
    if method["name"] == "simclr":
        method |= {"head_hidden": 48, "head_out": 24}
    values["data"] |= {"global_batch_size": 128 if large else 16, "image_size": 4 * patch, "num_workers": 1}
    values["schedule"] |= {"total": "4 steps", "warmup": "1 steps"}
    values["strategy"] |= {"micro_batch_size": None, "compile": False}
    values["checkpoint"] = {"every": "2 steps"}
    values["track"] = {"log_every": "1 steps", "wandb": "disabled"}
    return values


def fill(folder: Path) -> None:
    """What the README takes for granted."""
    for name in ("photos/train", "photos/val"):
        make_image_folder(folder / name, num_images=2 * CLASSES, classes=CLASSES, size=64, seed=len(name))
    listed = sorted((folder / "photos/train").rglob("*.jpg"))
    rows = [f"{path.relative_to(folder / 'photos')},{path.parent.name}\n" for path in listed]
    (folder / "labels.csv").write_text("path,label\n" + "".join(rows))
    (folder / "hosts").write_text("host1 slots=1\nhost2 slots=1\n")
    for name in sorted(set(re.findall(r"\b(?:dinov2|simclr|supervised)/\w+", "\n".join(COMMANDS)))):
        if not name.endswith("/demo"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(smaller(yaml.safe_load(find_recipe(name).read_text()))))
    for path in ROOT.iterdir():  # the checkout, which is where people are when they read it
        if path.name not in {".git", ".venv", "demo", "runs", "data", "photos"}:
            (folder / path.name).symlink_to(path)


def fill_weights(path: Path, recipe: Path) -> None:
    """Random weights by the names of the original DINOv2, of the model that `recipe` trains."""
    method = yaml.safe_load(recipe.read_text())["method"]
    sizes = {name: method[name] for name in ("depth", "embed_dim", "num_heads")}
    model = timm.create_model(method["backbone"], img_size=70, init_values=1e-5, **sizes)
    torch.save(original_names(model.state_dict(), num_positions=1), path)


def fill_hub(cache: Path, *names: str) -> None:
    """Random weights where the hub's client looks for those of timm's models that it has downloaded."""
    for name in names:
        model = timm.create_model(name)
        repository = cache / "hub" / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0" * 40)
        save_file(model.state_dict(), snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps({"architecture": model.pretrained_cfg["architecture"]}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands are run."""
    folder = tmp_path_factory.mktemp("readme") / "scaler"
    folder.mkdir()
    fill(folder)
    fill_weights(folder / "dinov2_vits14_pretrain.pth", folder / "dinov2/vits14_long")
    fill_hub(folder / "hub", "test_resnet", "vit_small_patch14_dinov2")
    before = dict(os.environ)
    with s3_server():
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def environment(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The commands' variables; the warm `scaler` comes first in PATH."""
    bin = Path(sys.executable).parent
    variables = {
        **os.environ,
        "PATH": f"{bin}:{os.environ['PATH']}",
        "HF_HOME": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": ""
        if torch.cuda.device_count() < 4
        else os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3"),
    }
    with warm_scaler(tmp_path_factory.mktemp("warm"), env=variables) as warm:
        yield {**variables, "PATH": f"{warm}:{variables['PATH']}"}


@pytest.fixture(scope="module")
def machines() -> Iterator[list[TestHost]]:
    with hosts(2) as found:
        yield found


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{i:02}-{command[:50]}" for i, command in enumerate(COMMANDS)])
def test_it_does_what_it_says(
    command: str, place: Path, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    if command.startswith(ITSELF):
        pytest.skip("it is what runs this test")
    if command.startswith(SLOW) and not LONG:
        pytest.skip("takes minutes: SCALER_TEST_LONG=1 runs it")
    shell = ["bash", "-euo", "pipefail", "-c", command]
    if re.search(r"--hosts? ?(hosts|\w*file hosts)|--hostfile hosts", command):
        host = request.getfixturevalue("machines")[0]
        cold = {**environment, "PATH": environment["PATH"].partition(":")[2]}  # the warm one is on another host
        done = host.run(shell, cwd=place, env=cold, timeout=300)
    else:
        done = subprocess.run(shell, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


def test_the_parser_sees_every_block() -> None:
    text = "```sh\na   # says\nb \\\n    --c\n# no\n\n```\ntext `x`\n```yaml\nd\n```\n```sh\ne\n```\n"
    assert commands(text) == ["a   # says", "b      --c", "e"]
    assert len(COMMANDS) > 30


def test_the_messages_that_it_explains_are_ours_or_said_to_be_others() -> None:
    """The first cell of each row of the table of messages, word for word."""
    table = (ROOT / "README.md").read_text().partition("## When it says")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    sources = "".join(
        path.read_text() for room in ("scaler", "shards", "launch") for path in (ROOT / room).rglob("*.py")
    )
    sources = re.sub(r"\"\s+f?\"", "", sources)  # strings over several lines are one
    assert len(cells) >= 10
    for cell in cells:
        if "'s)" not in cell:
            for message in re.findall(r"`([^`]+)`", cell):
                assert message in sources, message
