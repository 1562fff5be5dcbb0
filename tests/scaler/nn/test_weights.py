"""Weights in the layouts that people have, against timm and the original DINOv2 written out; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaler.nn.backbones import build_backbone
from scaler.nn.base import Backbone
from scaler.nn.vit import PackedViT
from scaler.nn.weights import Weights, load_backbone_
from tests.long import LONG

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2}
DINOV2 = [
    f"vit_{size}_patch14_{kind}" for size in ("small", "base", "large", "giant") for kind in ("dinov2", "reg4_dinov2")
]


def shaken(model: nn.Module) -> Any:
    """The model with values that would show any mix-up."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()


def reference(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(timm.create_model(name, **{"num_classes": 0, "dynamic_img_size": True, **options}))


def built(name: str, *, image_size: int = 56, **options: Any) -> PackedViT:
    torch.manual_seed(1)
    vit = build_backbone(name, image_size=image_size, **options).eval()
    assert isinstance(vit, PackedViT)
    return vit


def weights(tensors: dict[str, Tensor], **facts: Any) -> Weights:
    return Weights("w.pth", tensors, **facts)


@torch.no_grad()
def assert_same_features(vit: Backbone, expected: Tensor, images: Tensor, *, prefix: int) -> None:
    """Class token and patches [n, t, d], where the largest differences are set against the largest values."""
    out = vit([images])[0]
    scale = float(expected.abs().max())
    torch.testing.assert_close(out.cls, expected[:, 0], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(out.patches, expected[:, prefix:], rtol=0, atol=1e-5 * scale)


# ---------------------------------------------------------------------- timm's layout


@pytest.mark.parametrize("name", DINOV2)
def test_timms_dinov2_models_give_timms_features_on_another_grid(name: str) -> None:
    options = {"depth": 1 if "giant" in name else 2} if LONG else SMALL
    model = reference(name, img_size=518, **options)
    vit = built(name, **options)
    loaded = load_backbone_(vit, weights(model.state_dict()))
    assert loaded.prefix == "" and "positions resized from 37×37 to 4×4" in loaded.line
    images = torch.randn(2, 3, 56, 42)  # a third grid: positions are resized twice, as by timm
    own = reference(name, img_size=56, **options)
    own.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), own))
    with torch.no_grad():
        assert_same_features(vit, own.forward_features(images), images, prefix=own.num_prefix_tokens)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_resnet", 32, {}),
        ("test_convnext", 32, {}),
        ("densenet121", 32, {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),  # which knows of no drop path
        ("levit_128s", 224, {}),  # whose classifier has a norm of its own
        ("test_efficientnet", 32, {}),  # whose blocks are numbered like chunks of DINOv2's
        ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}),
    ],
)
def test_any_timm_model_loads_with_its_classifier_left_out(name: str, size: int, options: dict[str, Any]) -> None:
    options = dict(options)
    torch.manual_seed(0)
    model = shaken(timm.create_model(name, num_classes=7, **options))
    backbone = build_backbone(name, image_size=size, **options).eval()
    model.half()
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    loaded = load_backbone_(backbone, weights(wrapped))
    assert loaded.prefix == "module." and "left out: " in loaded.line
    assert ("translated by timm" in loaded.line) == name.startswith("swin")  # its windows are of another size
    resized = {"img_size": size} if name.startswith("swin") else {}
    own = timm.create_model(name, num_classes=0, **resized, **options).eval()
    values = model.float().state_dict()
    if resized:
        values = timm.models.swin_transformer.checkpoint_filter_fn(values, own)
    own.load_state_dict(values, strict=False)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(backbone.pooled(images), own(images), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 3]), st.booleans(), st.booleans(), st.integers(2, 6), st.booleans())
def test_the_class_tokens_position_may_be_apart_or_in_the_token(
    registers: int, source: bool, target: bool, side: int, half: bool
) -> None:
    names = [{"reg_tokens": registers, "no_embed_class": inside} for inside in (source, target)]
    small = {"depth": 1, "embed_dim": 12, "num_heads": 2, "patch_size": 4, "img_size": 4 * side}
    model = reference("vit_tiny_patch16_224", **small, **names[0])
    own = PackedViT(reference("vit_tiny_patch16_224", **small, **names[1])).eval()
    state = {name: value.double() if not half else value.half() for name, value in model.state_dict().items()}
    load_backbone_(own, weights(state))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    images = torch.randn(2, 3, 4 * side, 4 * side)
    with torch.no_grad():
        assert_same_features(own, model.forward_features(images), images, prefix=model.num_prefix_tokens)


# ---------------------------------------------------------------------- the original DINOv2's layout


def original(
    *, depth: int = 3, width: int = 24, patch: int = 14, side: int = 5, registers: int = 0, swiglu: bool = False
) -> dict[str, Tensor]:
    """A state dict as `facebookresearch/dinov2` names it, of random values."""
    hidden = (int(width * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * width
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side * side, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for i in range(depth):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= (
            {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
            if swiglu
            else {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        )
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
    torch.manual_seed(2)
    return {name: torch.randn(shape) * (0.3 if len(shape) > 1 else 0.5) for name, shape in shapes.items()}


def original_forward(w: dict[str, Tensor], images: Tensor, *, heads: int) -> Tensor:
    """What the original computes at its own grid, written out: normalised tokens [n, 1 + registers + p, d]."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    n, width = len(x), x.shape[-1]
    x = torch.cat([w["cls_token"].expand(n, -1, -1), x], dim=1) + w["pos_embed"]
    if "register_tokens" in w:
        x = torch.cat([x[:, :1], w["register_tokens"].expand(n, -1, -1), x[:, 1:]], dim=1)
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], eps=1e-6)
        qkv = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"])
        q, k, v = qkv.reshape(n, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, -1, width)
        x = x + b["ls1.gamma"] * F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], eps=1e-6)
        if "mlp.w12.weight" in b:
            gate, value = F.linear(y, b["mlp.w12.weight"], b["mlp.w12.bias"]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * value, b["mlp.w3.weight"], b["mlp.w3.bias"])
        else:
            y = F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])
            y = F.linear(F.gelu(y), b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        x = x + b["ls2.gamma"] * y
    return F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], eps=1e-6)


def in_chunks(w: dict[str, Tensor], *, size: int) -> dict[str, Tensor]:
    """Blocks in chunks, as for FSDP, whose wrappers are left in the names."""
    named = {}
    for name, tensor in w.items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            name = f"blocks._fsdp_wrapped_module.{int(block) // size}.{block}.{rest}"
        named[name] = tensor
    return named


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {"registers": 4}),
        ("vit_giant_patch14_dinov2", {"swiglu": True}),
        ("vit_giant_patch14_reg4_dinov2", {"swiglu": True, "registers": 4}),
    ],
)
def test_the_original_layout_gives_the_originals_features(name: str, changes: dict[str, Any], chunked: bool) -> None:
    tensors = original(**changes)
    vit = built(name, image_size=70, mask_token=True, depth=3, embed_dim=24, num_heads=2)
    named = in_chunks(tensors, size=2) if chunked else tensors
    source = {f"teacher.backbone.{key}": value for key, value in named.items()}
    source |= {f"student.backbone.{key}": value + 1 for key, value in named.items()}
    loaded = load_backbone_(vit, weights(source if chunked else tensors))
    assert loaded.prefix == ("teacher.backbone." if chunked else "")
    assert vit.mask_token is not None and torch.equal(vit.mask_token, tensors["mask_token"])
    images = torch.randn(2, 3, 70, 70)
    expected = original_forward(tensors, images, heads=2)
    assert_same_features(vit, expected, images, prefix=1 + changes.get("registers", 0))


def test_registers_of_a_plain_name_take_the_originals_too() -> None:
    vit = built("vit_small_patch16_224", image_size=70, patch_size=14, registers=4, layer_scale=1e-5, depth=3,
                embed_dim=24, num_heads=2)  # fmt: skip
    tensors = original(registers=4)
    loaded = load_backbone_(vit, weights(tensors))
    assert loaded.line == "backbone: 49 tensors from w.pth; left out: mask_token"
    images = torch.randn(1, 3, 70, 70)
    assert_same_features(vit, original_forward(tensors, images, heads=2), images, prefix=5)


# ---------------------------------------------------------------------- what is excused, and what is refused


def test_what_is_excused_is_named() -> None:
    tensors = original()
    without = {name: value for name, value in tensors.items() if ".ls" not in name and name != "mask_token"}
    without |= {"head.weight": torch.randn(5, 24), "decoder_blocks.0.norm.weight": torch.randn(3)}
    vit = built("vit_small_patch14_dinov2", image_size=70, mask_token=True, depth=3, embed_dim=24, num_heads=2)
    pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    loaded = load_backbone_(vit, weights(without, normalization=pixels[0]), normalization=pixels[1])
    assert loaded.line == (
        "backbone: 42 tensors from w.pth; it has no LayerScale: factors of 1, which is the same; not in it, so as "
        "initialised: mask_token; left out: decoder_blocks, head; warning: it learned from pixels normalised by "
        f"{pixels[0]}, and gets them normalised by {pixels[1]}"
    )
    ones = {name: torch.ones_like(value) for name, value in tensors.items() if ".ls" in name}
    images = torch.randn(1, 3, 70, 70)
    assert_same_features(vit, original_forward({**without, **ones}, images, heads=2), images, prefix=1)


def changed(**changes: Any) -> dict[str, Tensor]:
    tensors = {**original(), **changes}
    return {name: value for name, value in tensors.items() if value is not None}


TWICE = {f"{net}.{name}": value for net in ("a", "b") for name, value in original().items()}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "another model": ({"conv1.weight": torch.zeros(1)}, "does not hold this backbone: no patch_embed.proj.*conv1"),
    "nothing": ({}, "it holds no tensor"),
    "two of them": (TWICE, r"holds this backbone 2 times, as a\.\* and b\.\*; save the one"),
    "a missing tensor": (changed(**{"norm.bias": None}), "lacks norm.bias; take the method.backbone"),
    "more blocks": (original(depth=5), r"has blocks.3.attn.qkv.weight and 27 more.*set method.depth: 5"),
    "fewer blocks": (original(depth=2), "lacks blocks.2.norm1.weight and 13 more tensors; set method.depth: 2"),
    "registers": (original(registers=4), "has reg_token, unlike the backbone; set method.registers: 4"),
    "patches": (original(patch=16), "shape .*24, 3, 16, 16.* set method.patch_size: 16"),
    "width": (original(width=32), "of shape .*; take the method.backbone that the weights are of"),
    "no square": (changed(pos_embed=torch.zeros(1, 24, 24)), "24 positions, which are no square grid"),
    "not finite": (changed(**{"norm.bias": torch.full((24,), torch.nan)}), "norm.bias is not finite"),
    "integers": (changed(**{"norm.bias": torch.ones(24, dtype=torch.int8)}), "norm.bias as torch.int8"),
    "half of the LayerScale": (changed(**{"blocks.0.ls1.gamma": None}), "lacks blocks.0.ls1.gamma"),
    "a second norm": (changed(**{"norm_pre.weight": torch.ones(24)}), "has norm_pre.weight, unlike the backbone"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    tensors, message = REFUSED[case]
    vit = built("vit_small_patch14_dinov2", image_size=70, depth=3, embed_dim=24, num_heads=2)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    with pytest.raises(ValueError, match=f"^w.pth.*{message}"):
        load_backbone_(vit, weights(tensors))
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_another_number_of_heads_shows_in_no_shape_and_is_refused_where_it_is_known() -> None:
    vit = built("vit_small_patch14_dinov2", image_size=70, depth=3, embed_dim=24, num_heads=2)
    load_backbone_(vit, weights(original(), num_heads=2))
    with pytest.raises(
        ValueError, match=r"^w\.pth has 3 attention heads and the backbone 2; set method\.num_heads: 3$"
    ):
        load_backbone_(vit, weights(original(), num_heads=3))


def test_torchvisions_resnets_are_timms() -> None:
    torch.manual_seed(0)
    model = shaken(torchvision.models.resnet18())
    backbone = build_backbone("resnet18", image_size=64).eval()
    assert "left out: fc" in load_backbone_(backbone, weights(model.state_dict())).line
    model.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.pooled(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "other"), [("state_dict_ema", "state_dict"), ("module.encoder_q", "module.encoder_k")]
)
def test_of_two_copies_the_averaged_or_the_first_is_taken_and_a_strange_tensor_refused(wanted: str, other: str) -> None:
    model = shaken(timm.create_model("test_resnet"))
    state = model.state_dict()
    both = {f"{other}.{k}": v + 1 for k, v in state.items()} | {f"{wanted}.{k}": v for k, v in state.items()}
    backbone = build_backbone("test_resnet", image_size=32)
    assert load_backbone_(backbone, weights(both)).prefix == f"{wanted}."
    assert all(torch.equal(value, state[name.removeprefix("model.")]) for name, value in backbone.state_dict().items())
    both[f"{wanted}.layer9.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"has layer9\.weight, unlike the backbone; take"):
        load_backbone_(backbone, weights(both))
