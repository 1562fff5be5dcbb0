"""Exported models are opened by the programs they are for, and give their source's features."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import save_for_hf

from scaler.evals.checkpoints import load_for_evaluation
from scaler.export import export, hub
from scaler.nn.backbones import build_backbone
from scaler.nn.weights import load_backbone_
from scaler.train import main
from scaler.weights import read_weights
from shards.index import ShardIndex
from tests.long import LONG
from tests.runs import make_shards, write_recipe
from tests.scaler.test_cli import scaler

FORMATS = {"timm": "folder", "dinov2": "model.pth", "torchscript": "model.pt", "onnx": "model.onnx"}
# Architectures small enough for a test: what a folder of timm's says of them, beside random weights.
FOLDERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "patch14": ("vit_small_patch14_dinov2", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 56}, 56),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "embed_dim": 48, "num_heads": 6, "img_size": 56}, 56),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 28}, 28),
    "resnet50": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, 64),
}
# onnxruntime takes seconds each; the others follow when asked for.
CASES = [
    (source, format)
    for source in (*FOLDERS, "dinov2", "supervised")
    for format in FORMATS
    if not (source == "resnet50" and format == "dinov2")
    and (LONG or format != "onnx" or source in ("resnet50", "dinov2"))
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of timm's, and short runs: DINOv2 with registers and its teacher, supervised with its average."""
    root = tmp_path_factory.mktemp("sources")
    for source, (name, arguments, size) in FOLDERS.items():
        save_folder(root / source, name, size=size, **arguments)
    shards = make_shards(root / "data")
    for method in ("dinov2", "supervised"):
        recipe = write_recipe(root / f"{method}.yaml", method, shards=shards)
        assert main([str(recipe), "schedule.total=2 steps", "data.global_batch_size=8"]) == 0
    return {name: root / name for name in (*FOLDERS, "dinov2", "supervised")}


def save_folder(folder: Path, name: str, *, size: int, **arguments: Any) -> Any:
    """A timm model whose every parameter matters, as timm saves it."""
    torch.manual_seed(0)
    dynamic = {"dynamic_img_size": True} if name.startswith("vit") else {}
    model: Any = timm.create_model(name, num_classes=0, **arguments, **dynamic).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    save_for_hf(model, str(folder), model_args={**arguments, **dynamic}, safe_serialization=True)
    return model


def opened(place: Path, format: str, source: str) -> Any:
    """What a program that has never heard of this package makes of an export: images → features."""
    if format == "timm":
        model: Any = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
        return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)
    if format == "torchscript":
        return lambda images: torch.jit.load(place)(images)[0]
    if format == "onnx":
        onnx.checker.check_model(place)
        session = onnxruntime.InferenceSession(place)
        return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    name, arguments, size = FOLDERS.get(source, ("vit_tiny_patch16_224", {}, 32))
    options = {key: arguments.get(key, value) for key, value in (("depth", 2), ("embed_dim", 36), ("num_heads", 3))}
    if not arguments:
        options |= {"patch_size": 8, "registers": 2, "layer_scale": 1e-5} if source == "dinov2" else {"patch_size": 8}
    ours = build_backbone(name, image_size=size, **options)
    load_backbone_(ours, read_weights(str(place), backbone=name))
    return ours.eval().pooled


@torch.no_grad()
def differs(found: Any, source: Path, *, size: int | None = None) -> float:
    model = load_for_evaluation(source, device="cpu")
    images = torch.randn(5, 3, size or model.image_size, size or model.image_size)
    return float((found(images) - model.method.features(images)).abs().max())


@pytest.mark.parametrize(("source", "format"), CASES)
def test_round_trip(source: str, format: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / FORMATS[format]
    report = export(str(sources[source]), out, format=format, dynamic_size=format == "onnx")
    assert max(report["difference"].values()) < 1e-5
    assert differs(opened(out, format, source), sources[source]) < 1e-5
    if format == "onnx":  # trained for one size, run on another
        assert differs(opened(out, format, source), sources[source], size=2 * report["image_size"]) < 1e-5
    if format == "timm":
        config = json.loads((out / "config.json").read_text())
        assert config["num_classes"] == 0 and config["pretrained_cfg"]["input_size"][1] == report["image_size"]
        assert differs(load_for_evaluation(out, device="cpu").method.features, sources[source]) < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {out.name}, "nothing else is left"


def test_other_parts(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["supervised"]
    method: Any = load_for_evaluation(source, device="cpu").method
    report = export(str(source), tmp_path / "scores", classifier=True)
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'scores'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = method.average["head"](method.features(images))
        assert report["outputs"] == ["features", "patches", "scores"]
        assert model.num_classes == 5 and (model(images) - wanted).abs().max() < 1e-5
    names = ShardIndex.load(source.parent / "data" / "shards").class_names
    assert len(names) == 5 and model.pretrained_cfg["label_names"] == names

    # It is what another training starts from.
    recipe = write_recipe(tmp_path / "on.yaml", "supervised", shards=source.parent / "data" / "shards")
    still = ["schedule.total=1 steps", "data.global_batch_size=8", "optim.lr=1e-30", "schedule.final_lr=0"]
    assert main([str(recipe), f"method.weights={tmp_path / 'scores'}", *still]) == 0
    assert torch.equal(
        load_for_evaluation(tmp_path / "on", device="cpu").method.features(images), method.features(images)
    )

    export(str(sources["dinov2"]), tmp_path / "student", part="student")
    dinov2: Any = load_for_evaluation(sources["dinov2"], device="cpu").method
    student, teacher = dinov2.student.backbone, dinov2.teacher.backbone
    found = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).state_dict()
    assert torch.equal(found["blocks.0.attn.qkv.weight"], student.state_dict()["blocks.0.attn.qkv.weight"])
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], teacher.state_dict()["blocks.0.attn.qkv.weight"])


def test_what_cannot_be_right_is_refused_in_one_line(sources: dict[str, Path], tmp_path: Path) -> None:
    save_folder(tmp_path / "relu", "test_vit", size=160, act_layer="relu")
    stem = write_recipe(tmp_path / "stem.yaml", "supervised_cnn", shards=sources["dinov2"].parent / "data" / "shards")
    resnet = ["method.backbone=resnet10t", "method.small_stem=true", "schedule.total=1 steps"]
    assert main([str(stem), *resnet, "data.global_batch_size=8"]) == 0
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    (tmp_path / "taken.onnx").write_text("theirs")
    vit, cnn = sources["patch14"], sources["resnet50"]
    for words, expected in (
        (
            [cnn, "x.pth", "--format", "dinov2"],
            "has plain ViTs only, and resnet50 is none: export it with --format timm",
        ),
        ([tmp_path / "relu", "x.pth", "--format", "dinov2"], "would give other .* they differ by"),
        ([tmp_path / "stem", "x"], "nobody could load the folder: export it with --format onnx"),
        ([vit, "x.pt", "--format", "torchscript", "--dynamic-size"], "does not run on 1 images of 70 pixels"),
        ([vit, "x.pt"], "a timm export is a folder; name one, or give --format torchscript"),
        ([vit, "x", "--format", "onnx"], "ends in .onnx; name it so"),
        ([vit, "x", "--classifier"], "has no classifier to export"),
        ([vit, "x", "--part", "student"], "has no student"),
        ([vit, "taken", "--overwrite"], "is no timm folder: it stays"),
        ([vit, "taken.onnx", "--format", "onnx"], "exists; --overwrite replaces it"),
        ([vit, "s3://bucket/x"], "is a URL"),
        ([vit, "x", "--push", "nobody"], "is no repository; give USER/NAME"),
    ):
        source, out, *options = words
        result = scaler("export", source, out if "://" in str(out) else tmp_path / str(out), *options)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result
        assert re.search(expected, result.stderr), result.stderr
    assert scaler("export", vit, tmp_path / "x.onnx", "--format", "onnx", "--push", "a/b").returncode == 2
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".*"))
    assert (tmp_path / "taken.onnx").read_text() == "theirs" and (tmp_path / "taken" / "thesis.tex").exists()


def test_a_card_says_what_the_model_is_and_where_it_comes_from(sources: dict[str, Path], tmp_path: Path) -> None:
    source, out = sources["dinov2"], tmp_path / "model"
    (out / "config.json").parent.mkdir()
    assert scaler("export", source, out, "--json").returncode == 0  # an empty folder is no export
    (source / "evaluations").mkdir()
    for step, top1 in ((1, 0.25), (2, 0.5)):
        found = {
            "evaluation": "knn",
            "step": step,
            "k": 5,
            "train_samples": 20,
            "val_samples": 10,
            "top1": top1,
            "top5": 1.0,
        }
        (source / "evaluations" / f"knn-{step}.json").write_text(json.dumps(found))
    result = scaler("export", source, out, "--license", "cc-by-4.0", "--overwrite", "--json")
    report = json.loads(result.stdout)
    assert report["step"] == 2 and report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    header, text = (out / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0" and "dinov2" in yaml.safe_load(header)["tags"]
    manifest = json.loads((source / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    rows = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    for expected in (
        manifest["fingerprint"],
        "| images seen | 16 |",
        "| images in the data | 1,009 |",
        f"| loss at step 2 | {rows[-1]['loss']:.4g} |",
        "| knn (k 5, 20 train samples, 10 val samples) | top1 0.5, top5 1 |",
        "cc-by-4.0",
        f'timm.create_model("local-dir:{out}", pretrained=True)',
    ):
        assert expected in text, expected
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["method"]["registers"] == 2 and recipe["data"]["shards"] == "data/shards"
    assert str(source.parent) not in text, "where things lay is nobody's business"

    # The code in the card runs, and gives what evaluations see.
    code = text.partition("```python\n")[2].partition("```")[0]
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "image.jpg")
    names: dict[str, Any] = {}
    exec(code.replace('"image.jpg"', repr(str(tmp_path / "image.jpg"))), names)
    method = load_for_evaluation(source, device="cpu").method
    assert names["features"].shape == (1, 36)
    assert torch.allclose(method.features(names["image"]), names["features"], atol=1e-5)


@contextlib.contextmanager
def small_hub(token: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A hub of one user who has this token: its address, and what it was given, files by name."""
    given: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if not self.knows():
                return
            if path == "/api/repos/create":
                given["repository"] = json.loads(body)
                self.answer(200, {"url": f"{address}/me/model"})
            elif path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self.answer(200, {"files": [{"path": file["path"], **plain} for file in files]})
            elif path.endswith("/commit/main"):
                for item in map(json.loads, body.splitlines()):
                    if item["key"] == "file":
                        given[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                self.answer(200, {"commitUrl": f"{address}/me/model/commit/1", "commitOid": "1" * 40})
            else:
                self.answer(200, {"errors": [], "warnings": []})  # of the card's header

        def do_GET(self) -> None:
            if self.knows():
                self.answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": []})

        def knows(self) -> bool:
            known = self.headers.get("Authorization") == f"Bearer {token}"
            if not known:
                self.answer(401, {"error": "Invalid username or password."})
            return known

        def answer(self, code: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address, given
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_folder_is_pushed_to_a_hub(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    export(str(sources["patch14"]), tmp_path / "model", repository="me/model", license="mit")
    with small_hub("hf_secret") as (endpoint, given):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(ValueError, match=r"could not be pushed to http://127.* log in with") as refused:
            hub.push(tmp_path / "model", "me/model", endpoint=endpoint)
        assert len(str(refused.value).splitlines()) == 1 and given == {}
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert hub.push(tmp_path / "model", "me/model", private=True, endpoint=endpoint) == f"{endpoint}/me/model"
    with pytest.raises(ValueError, match=r"could not be pushed .*ConnectError.* is complete"):
        hub.push(tmp_path / "model", "me/model", endpoint=endpoint)  # where nobody listens any more
    repository = given.pop("repository")
    assert repository["name"] == "model" and repository["organization"] == "me"
    assert repository.get("visibility", repository.get("private")) in ("private", True)  # as older clients say it
    assert given == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert b'timm.create_model("hf-hub:me/model", pretrained=True)' in given["README.md"]
    printed = capfd.readouterr()
    assert "hf_" not in printed.out + printed.err + str(refused.value)
