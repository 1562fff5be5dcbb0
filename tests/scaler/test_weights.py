"""Where weights come from, with real files, runs and timm's own folders and cache; and runs that start from them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fsspec import filesystem
from safetensors.torch import save_file
from torch import Tensor

from scaler.checkpoint.tools import convert as convert_checkpoint
from scaler.evals.checkpoints import load_for_evaluation
from scaler.nn.backbones import build_backbone
from scaler.nn.weights import Weights, load_backbone_
from scaler.train import main
from scaler.weights import read_weights
from shards.convert import convert
from shards.index import ShardIndex
from tests.images import make_image_folder
from tests.runs import make_shards, weights, write_recipe
from tests.scaler.test_cli import scaler

VIT = "test_vit"
STILL = ["optim.lr=1e-30", "schedule.final_lr=0"]  # steps that leave the weights as they are


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a method for a step (or `steps`) and returns its checkpoint; at warm-up's first step nothing moves."""

    def run(method: str, *overrides: str, steps: int = 1, code: int = 0) -> Path:
        recipe = write_recipe(tmp_path_factory.mktemp("run") / "run.yaml", method, shards=shards)
        words = [str(recipe), f"schedule.total={steps} steps", "data.global_batch_size=8", *overrides]
        assert main(words) == code
        return recipe.with_suffix("") / "checkpoints" / f"step-{steps:08d}"

    return run


@pytest.fixture(scope="module")
def model() -> Any:
    """timm's smallest ViT with its classifier."""
    torch.manual_seed(0)
    return timm.create_model(VIT).eval()


def same(found: Weights, expected: dict[str, Tensor], *, prefix: str = "") -> bool:
    return {name for name in found.tensors if name.startswith(prefix)} == {prefix + name for name in expected} and all(
        torch.equal(found.tensors[prefix + name], value) for name, value in expected.items()
    )


# ---------------------------------------------------------------------- files


def test_files_of_torch_and_safetensors_here_and_at_urls(model: Any, tmp_path: Path) -> None:
    state = model.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    nested = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1),
        "model": {"teacher": state},
        "optimizer": {"state": {0: {}}},
    }
    torch.save(nested, tmp_path / "nested.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file({**state, "half": torch.arange(3).half(), "none": torch.empty(0, 2)}, tmp_path / "w.safetensors")
    files = filesystem("memory")
    for name in ("plain.pth", "w.safetensors"):
        files.pipe_file(f"/weights/{name}", (tmp_path / name).read_bytes())
    for place in (str(tmp_path / "plain.pth"), str(tmp_path / "old.bin"), "memory://weights/plain.pth"):
        assert same(read_weights(place, backbone=VIT), state), place
    assert same(read_weights(str(tmp_path / "nested.pt"), backbone=VIT), state, prefix="model.teacher.")
    for place in (str(tmp_path / "w.safetensors"), "memory://weights/w.safetensors"):
        found = read_weights(place, backbone=VIT)
        assert found.place == place and found.tensors["half"].dtype == torch.float16
        assert found.tensors["none"].shape == (0, 2) and len(found.tensors) == len(state) + 2
        assert all(torch.equal(found.tensors[name], value) for name, value in state.items())


class Secret:
    """Something whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


def test_bad_files_are_one_line_errors_and_nothing_is_unpickled(model: Any, tmp_path: Path, capfd: Any) -> None:
    torch.save({"model": model.state_dict(), "more": Secret()}, tmp_path / "unsafe.pth")
    torch.save(model, tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("not a file of torch's")
    (tmp_path / "empty.pt").touch()
    whole = (tmp_path / "unsafe.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "weights.npz").touch()
    (tmp_path / "folder").mkdir()
    loop: dict[str, Any] = {"w": torch.zeros(2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    expected = {
        "unsafe.pth": "holds more than tensors .*print.* could run code; save its state dict alone",
        "module.pth": "holds more than tensors .*VisionTransformer",
        "text.pth": "is damaged, or no file of torch's",
        "empty.pt": "is damaged, or no file of torch's",
        "cut.pth": "is damaged, or no file of torch's",
        "cut.safetensors": "is damaged: its header claims",
        "weights.npz": "is a file that does not end in .safetensors, .pth",
        "none": "does not exist; give weights as timm, timm:NAME, a file, a run or a checkpoint",
        "folder": "is no checkpoint .* and no run directory",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message) as error:
            read_weights(str(tmp_path / name), backbone=VIT)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(ValueError, match="does not exist; give weights as"):
        read_weights(str(tmp_path / "missing.pth"), backbone=VIT)
    assert len(read_weights(str(tmp_path / "loop.pth"), backbone=VIT).tensors) < 10
    assert "never be printed" not in "".join(capfd.readouterr())


# ---------------------------------------------------------------------- timm


def test_a_folder_of_timms_brings_its_name_and_pixels(model: Any, tmp_path: Path) -> None:
    for safe in (True, False):
        timm.models.save_for_hf(model, str(tmp_path / str(safe)), safe_serialization=safe)
        found = read_weights(str(tmp_path / str(safe)), backbone=f"{VIT}.r160_in1k")
        assert same(found, model.state_dict()) and found.normalization == ((0.5,) * 3, (0.5,) * 3)
        assert found.num_heads == model.blocks[0].attn.num_heads
    with pytest.raises(ValueError, match=f"timm's {VIT}, and the backbone resnet18: set method.backbone: {VIT}"):
        read_weights(str(tmp_path / "True"), backbone="resnet18")
    (tmp_path / "True" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no file with weights"):
        read_weights(str(tmp_path / "True"), backbone=VIT)
    (tmp_path / "True" / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match=r"config.json is not timm's \(KeyError: 'architecture'\)"):
        read_weights(str(tmp_path / "True"), backbone=VIT)


def test_timms_own_weights_come_from_its_cache_or_not_at_all(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"timm cannot give the weights of {VIT} .* without network, fetch") as error:
        read_weights("timm", backbone=VIT)
    assert "\n" not in str(error.value)
    snapshot = tmp_path / f"models--timm--{VIT}.r160_in1k"  # as the hub's client lays it out
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    timm.models.save_for_hf(model, str(snapshot / "snapshots" / ("0" * 40)), safe_serialization=True)
    for source, backbone in (("timm", VIT), (f"timm:{VIT}.r160_in1k", "vit_tiny_patch16_224")):
        found = read_weights(source, backbone=backbone)
        assert same(found, model.state_dict()) and found.place == f"timm's {VIT}.r160_in1k"
        assert found.num_heads == model.blocks[0].attn.num_heads
        assert found.normalization == ((0.5,) * 3, (0.5,) * 3)
    evaluated = load_for_evaluation(f"timm:{VIT}", device="cpu", image_size=32)
    assert evaluated.method.normalization == found.normalization and evaluated.line.endswith("left out: head")
    with pytest.raises(ValueError, match="timm has no model 'test_vi'; did you mean test_vit"):
        read_weights("timm:test_vi", backbone=VIT)
    with pytest.raises(ValueError, match="timm cannot give the weights of test_vit4"):
        read_weights("timm", backbone="test_vit4")


# ---------------------------------------------------------------------- our own runs


def test_a_run_gives_its_backbone_to_another_method(train: Callable[..., Path], tmp_path: Path, capfd: Any) -> None:
    source = train("simclr", "run.seed=5")
    convert_checkpoint(source, tmp_path / "parts", num_files=5)  # tensors in ranges, as sharded strategies write them
    capfd.readouterr()
    before = weights(source)
    for place in (source.parents[1], source, tmp_path / "parts"):
        after = weights(train("supervised", f"method.weights={place}", "method.ema=0.9", *STILL))
        copied = [name for name in before if name.startswith("method/backbone.")]
        assert len(copied) > 20 and all(torch.equal(after[name], before[name]) for name in copied)
        average = [name.replace("method/", "method/average.") for name in copied]
        assert all(torch.equal(after[a], before[name]) for a, name in zip(average, copied, strict=True))
        line = f"backbone: {len(copied)} tensors from "
        assert line in capfd.readouterr().out
    random = weights(train("supervised", *STILL))
    assert not torch.equal(random["method/backbone.cls_token"], before["method/backbone.cls_token"])


def test_fixed_positions_and_initial_weights_give_way_to_the_weights(train: Callable[..., Path], capfd: Any) -> None:
    source = train("simclr", "run.seed=5")
    capfd.readouterr()
    target = train("simclr", f"method.weights={source}", "method.sincos_positions=true", *STILL)
    assert "the positions are the weights' own, and stay fixed" in " ".join(capfd.readouterr().out.split())
    name = "method/backbone.pos_embed"
    assert torch.equal(weights(target)[name], weights(source)[name])
    train("simclr", f"method.weights={source}", "method.initial_weights=moco_v3", code=2)
    assert "initial_weights=moco_v3 has no effect with weights" in capfd.readouterr().err


def test_the_averaged_weights_of_a_run_are_taken(train: Callable[..., Path]) -> None:
    source = train("supervised", "method.ema=0.9", steps=2)
    tensors, found = weights(source), read_weights(str(source), backbone="vit_tiny_patch16_224")
    vit = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2, embed_dim=36, num_heads=3)
    assert load_backbone_(vit, found).prefix == "average.backbone."
    assert found.num_heads == 3
    assert torch.equal(vit.state_dict()["cls_token"], tensors["method/average.backbone.cls_token"])
    assert not torch.equal(vit.state_dict()["cls_token"], tensors["method/backbone.cls_token"])


def test_dinov2_goes_on_with_heads_and_centres_at_another_size(train: Callable[..., Path], capfd: Any) -> None:
    softmax = "method.centering=softmax"
    source = train("dinov2", softmax, "run.seed=5", steps=3)
    before = weights(source)
    capfd.readouterr()
    target = train("dinov2", softmax, f"method.weights={source}", "data.image_size=48", "method.local_size=24", *STILL)
    said = " ".join(capfd.readouterr().out.split())
    assert (
        "(teacher.backbone.*); positions resized from 4×4 to 6×6" in said and "heads: " in said and "centres: " in said
    )
    after = weights(target)
    for name, value in before.items():
        if name.startswith("method/teacher.") and not name.endswith("pos_embed"):
            assert torch.equal(after[name], value), name
            assert torch.equal(after[name.replace("teacher.", "student.")], value), name
    center = "method/cls_center"  # it has moved by a tenth towards this step's mean
    assert (after[center] - before[center]).norm() < 0.5 * before[center].norm()
    capfd.readouterr()
    train("dinov2", softmax, f"method.weights={source}", "method.num_prototypes=50")
    assert "heads: start afresh" in (said := " ".join(capfd.readouterr().out.split()))
    assert "dino_head.last_layer.weight_g of shape [61, 1] where the recipe wants [50, 1]" in said


def test_a_resumed_run_reads_its_checkpoint_only_and_bad_weights_stop_it(
    train: Callable[..., Path], tmp_path: Path, capfd: Any
) -> None:
    source = train("simclr")
    shutil.copytree(source, tmp_path / "weights")
    first = train("simclr", f"method.weights={tmp_path / 'weights'}", "run.stop_after=1 steps", steps=2, code=0).parent
    shutil.rmtree(tmp_path / "weights")
    recipe = first.parent.with_suffix(".yaml")
    words = [str(recipe), "schedule.total=2 steps", "data.global_batch_size=8"]
    assert main([*words, f"method.weights={tmp_path / 'weights'}"]) == 0
    assert (first / "step-00000002").is_dir()
    capfd.readouterr()
    assert main([*words, f"method.weights={tmp_path / 'weights'}", f"run.dir={tmp_path / 'other'}"]) == 1
    assert main([*words, f"method.weights={source}", "method.depth=3", f"run.dir={tmp_path / 'other'}"]) == 1
    assert main([*words, f"method.weights={source}", "method.num_heads=4", f"run.dir={tmp_path / 'other'}"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "weights does not exist; give weights as" in lines[0]
    assert "lacks blocks.2.norm1.weight" in lines[1] and lines[1].endswith("that the weights are of")
    assert "set method.depth: 2, or" in lines[1]
    assert lines[2].endswith("has 3 attention heads and the backbone 4; set method.num_heads: 3")


# ---------------------------------------------------------------------- evaluation


def test_one_command_evaluates_runs_files_and_timms_models(train: Callable[..., Path], tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", num_images=24, classes=2, size=32, format="png")
    convert(tmp_path / "images", shards := tmp_path / "shards", workers=1)
    run = train("simclr", "method.backbone=test_vit", "method.patch_size=null", "method.depth=null",
                "method.embed_dim=null", "method.num_heads=null")  # fmt: skip
    convert_checkpoint(run, tmp_path / "w.safetensors")
    options = ["--train", str(shards), "--val", str(shards), "--k", "5", "--json"]

    def knn(*words: str, code: int = 0) -> Any:
        result = scaler("eval", "knn", *words, *options)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout) if code == 0 else result.stderr

    of_run, of_file = knn(str(run)), knn(str(tmp_path / "w.safetensors"), "--backbone", VIT, "--image-size", "32")
    assert of_run["top1"] == of_file["top1"] and (of_run["step"], of_file["step"]) == (1, None)
    assert of_file["weights"].startswith("backbone: ") and of_run["image_size"] == of_file["image_size"] == 32
    models = (
        load_for_evaluation(run, device="cpu"),
        load_for_evaluation(tmp_path / "w.safetensors", device="cpu", backbone=VIT, image_size=32),
    )
    index = ShardIndex.load(shards)
    assert torch.equal(*(model.features(index)[0] for model in models))
    assert knn(str(run), "--image-size", "64")["image_size"] == 64
    random = knn(f"timm:{VIT}", "--random-init", "--image-size", "32")
    assert random["step"] == 0 and random["weights"] == f"random weights of {VIT}"
    timm.models.save_for_hf(timm.create_model(VIT), str(tmp_path / "folder"), safe_serialization=True)
    assert knn(str(tmp_path / "folder"))["image_size"] == 160
    assert "give timm's name of the model (--backbone)" in knn(str(tmp_path / "w.safetensors"), code=1)
    assert f"knows its backbone: leave {VIT} out" in knn(str(run), "--backbone", VIT, code=1)
    assert "image_size 33 is not a multiple of the patch size" in knn(str(run), "--image-size", "33", code=1)
