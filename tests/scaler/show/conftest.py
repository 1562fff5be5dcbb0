"""Images and an untrained model for the tests of pictures."""

from __future__ import annotations

import pytest
import torch

from scaler.evals.checkpoints import BareBackbone, EvaluationModel
from scaler.nn.backbones import build_backbone
from shards.convert import convert
from shards.index import ShardIndex
from tests.images import make_image_folder


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """30 images of three classes; the bytes of number 7 in path order are cut off after its header."""
    folder = tmp_path_factory.mktemp("show")
    files = make_image_folder(folder / "images", num_images=30, size=48)
    damaged = sorted(files)[7]
    damaged.write_bytes(damaged.read_bytes()[:900])
    convert(folder / "images", folder / "shards", workers=1)
    return ShardIndex.load(folder / "shards")


def make_model(name: str, *, image_size: int, **options: object) -> EvaluationModel:
    """A backbone of timm with random weights, made so that all of it has a part in the result."""
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=image_size, **options)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    method = BareBackbone(backbone, image_size=image_size, normalization=((0.5,) * 3, (0.25,) * 3)).eval()
    return EvaluationModel(method, image_size=image_size, step=None, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def vit() -> EvaluationModel:
    """A small ViT with registers, and with norms of its queries and keys."""
    options = {"patch_size": 8, "depth": 2, "embed_dim": 36, "num_heads": 3, "registers": 2, "qk_norm": True}
    return make_model("vit_tiny_patch16_224", image_size=32, **options)
