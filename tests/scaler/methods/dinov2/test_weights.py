"""Continued pre-training from a training checkpoint of the original DINOv2: its heads and centres, or why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaler.methods.dinov2.method import DINOv2
from scaler.nn.weights import Weights
from tests.scaler.methods.dinov2.tiny import tiny_method

RENAMED = {
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
    "backbone.reg_token": "backbone.register_tokens",
}


def checkpoint(method: DINOv2, *, new_norm: bool) -> dict[str, Tensor]:
    """As the original saves it: student and teacher, the losses' centres, and torch's newer weight normalisation."""
    state = {}
    for name, value in method.state_dict().items():
        if name.startswith(("student.", "teacher.")):
            for ours, theirs in RENAMED.items():
                name = name.replace(ours, theirs) if new_norm or "token" in ours else name
            state[f"model.{name}"] = value
    num = method.settings.num_prototypes
    for name, shape in (("dino_loss.center", (1, num)), ("ibot_patch_loss.center", (1, 1, num))):
        state[f"model.{name}"] = torch.randn(shape)
    return state


def load(method: DINOv2, state: dict[str, Tensor]) -> list[str]:
    return method.load_weights(lambda source, *, backbone: Weights(source, state))


@pytest.mark.parametrize("new_norm", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_student_and_teacher_start_from_the_checkpoints_teacher(new_norm: bool, separate: bool) -> None:
    changes: dict[str, Any] = {"centering": "softmax", "separate_heads": separate, "registers": 2}
    source = tiny_method(seed=1, **changes)
    state = checkpoint(source, new_norm=new_norm)
    method = tiny_method(seed=2, weights="model_0001.pth", **changes)
    lines = load(method, state)
    assert lines[0].endswith("tensors from model_0001.pth (model.teacher.backbone.*)")
    assert lines[1].startswith("heads: ") and lines[2] == "centres: from model_0001.pth"
    expected = source.teacher.state_dict()
    for network in (method.student, method.teacher):
        found = network.state_dict()
        # The class token's position may move into the token, which changes no feature; here neither has one apart.
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(method.get_buffer("cls_center"), state["model.dino_loss.center"].flatten())
    assert torch.equal(method.get_buffer("patch_center"), state["model.ibot_patch_loss.center"].flatten())
    assert all(p.requires_grad for p in method.student.parameters())
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_heads_that_do_not_fit_start_afresh_alike_in_both() -> None:
    state = checkpoint(tiny_method(seed=1), new_norm=False)
    method = tiny_method(seed=2, weights="w.pth", separate_heads=True, centering="softmax")
    lines = load(method, state)
    assert lines[1:] == [
        "heads: start afresh, w.pth has others (they differ in ibot_head.last_layer.weight_g; see "
        "method.separate_heads)"
    ]
    assert method.get_buffer("cls_center").count_nonzero() == 0
    other = tiny_method(seed=2, weights="w.pth", num_prototypes=41)
    assert "weight_g of shape [40, 1] where the recipe wants [41, 1]" in load(other, state)[1]
    for changed in (method, other):
        teacher = changed.teacher.state_dict()
        assert all(torch.equal(value, teacher[name]) for name, value in changed.student.state_dict().items())
    only = {
        name.removeprefix("model.teacher.backbone."): v for name, v in state.items() if ".teacher.backbone." in name
    }
    assert load(tiny_method(weights="w.pth"), only)[1] == "heads: start afresh, w.pth has none"
    without = {name: value for name, value in state.items() if "center" not in name}
    again = tiny_method(weights="w.pth", centering="softmax")
    assert load(again, without)[2] == "centres: start at zero, w.pth has none that fit"
