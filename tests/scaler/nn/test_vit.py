"""Packed ViTs against timm's own forward, against separate passes, and against drop path written out densely."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scaler.nn.backbones import build_backbone
from scaler.nn.vit import PackedViT, resize_positions

MODELS = {
    "plain": ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 48, "num_heads": 3}, 64),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 3, "embed_dim": 48, "num_heads": 3}, 56),
    "swiglu": ("vit_giant_patch14_dinov2", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 56),
    "qk norm, small patches": ("vit_tiny_patch16_224", {"depth": 2, "qk_norm": True, "patch_size": 8}, 32),
}


def tiny(drop_path: float = 0.0, **options: object) -> PackedViT:
    torch.manual_seed(0)
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "layer_scale": 0.5} | options
    vit = build_backbone("vit_tiny_patch16_224", image_size=32, mask_token=True, drop_path=drop_path, **options)
    assert isinstance(vit, PackedViT)
    return vit


@pytest.mark.parametrize("case", MODELS)
def test_timm_weights_load_strictly_and_give_timms_features_at_any_size(case: str) -> None:
    name, options, size = MODELS[case]
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=0, img_size=size, dynamic_img_size=True, **options).eval()
    for parameter in reference.parameters():  # values that would show any mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    backbone = build_backbone(name, image_size=size, **options).eval()
    backbone.load_state_dict(reference.state_dict(), strict=True)
    p = backbone.patch_size
    assert p is not None
    crops = [torch.randn(3, 3, size, size), torch.randn(2, 3, 2 * p, 3 * p)]
    for images, out in zip(crops, backbone(crops), strict=True):
        expected = reference.forward_features(images)
        torch.testing.assert_close(out.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.patches, expected[:, reference.num_prefix_tokens :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.pooled(crops[0]), reference(crops[0]), rtol=1e-5, atol=1e-5)


def test_the_mask_token_is_the_only_name_that_timm_does_not_have() -> None:
    vit = tiny()
    reference = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3, embed_dim=48, num_heads=3, patch_size=8,
        init_values=0.5,
    )  # fmt: skip
    assert set(vit.state_dict()) == set(reference.state_dict()) | {"mask_token"}


@pytest.mark.parametrize("registers", [0, 2])
def test_one_pass_equals_separate_passes_with_gradients(registers: int) -> None:
    vit = tiny(registers=registers).double()
    crops = [torch.randn(4, 3, 32, 32).double(), torch.randn(6, 3, 16, 16).double(), torch.randn(1, 3, 24, 8).double()]
    mask = torch.rand(4, 16) < 0.4
    together = vit(crops, masks=[mask, None, None])
    loss = sum((out.cls.square().sum() + out.patches.cos().sum() for out in together), torch.zeros(()))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in vit.named_parameters()}
    vit.zero_grad()
    for images, m, out in zip(crops, [mask, None, None], together, strict=True):
        alone = vit([images], masks=[m])[0]
        torch.testing.assert_close(alone.cls, out.cls, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.patches, out.patches, rtol=1e-10, atol=1e-10)
        (alone.cls.square().sum() + alone.patches.cos().sum()).backward()
    for name, p in vit.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-9)


def test_the_mask_token_replaces_patches_before_positions_are_added() -> None:
    vit = tiny(registers=2)
    with torch.no_grad():
        vit.mask_token.fill_(3.0)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, [0, 15]] = True
    images = torch.randn(2, 3, 32, 32)
    plain, masked = vit.embed(images), vit.embed(images, mask)
    expected = plain.clone()
    patches = expected[:, 3:]  # class token, 2 registers
    patches[mask] = (3.0 + vit.pos_embed).expand(2, -1, -1)[mask]
    torch.testing.assert_close(masked, expected)


def test_registers_come_after_the_class_token_and_have_no_position() -> None:
    vit = tiny(registers=2)
    assert vit.pos_embed.shape == (1, 16, 48) and vit.reg_token.shape == (1, 2, 48)
    tokens = vit.embed(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(tokens[:, 1:3], vit.reg_token.expand(2, -1, -1))


@pytest.mark.parametrize("new", [(4, 4), (2, 3), (9, 5), (14, 14), (1, 1)])
def test_positions_are_resized_as_in_timm(new: tuple[int, int]) -> None:
    positions = torch.randn(1, 2 + 7 * 6, 5)
    expected = resample_abs_pos_embed(positions, new_size=list(new), old_size=[7, 6], num_prefix_tokens=2)
    actual = resize_positions(positions, num_prefix_tokens=2, old=(7, 6), new=new)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert resize_positions(positions, num_prefix_tokens=2, old=(7, 6), new=(7, 6)) is positions


def test_masks_without_a_mask_token_are_an_error() -> None:
    vit = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1)
    with pytest.raises(ValueError, match="mask_token=True"):
        vit([torch.randn(1, 3, 32, 32)], masks=[torch.ones(1, 16, dtype=torch.bool)])


def dense_forward(vit: PackedViT, images: Tensor, keep: Tensor) -> Tensor:
    """Every branch on every row, then zeroed where the row is not kept and scaled by rows / kept; [n, t, d]."""
    x = vit.embed(images)
    n = len(x)
    for i, block in enumerate(vit.blocks):
        for branch in (0, 1):
            kept = torch.zeros(n, 1, 1, dtype=x.dtype)
            kept[keep[i, branch]] = n / keep.shape[-1]
            branches = (lambda x, b=block: b.ls1(b.attn(b.norm1(x))), lambda x, b=block: b.ls2(b.mlp(b.norm2(x))))
            x = x + kept * branches[branch](x)  # with timm's own attention
    return vit.norm(x)


@pytest.mark.parametrize("seed", range(5))
def test_drop_path_equals_the_dense_formula_with_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    vit = tiny(drop_path=0.4).double()
    crops = [torch.randn(5, 3, 32, 32).double(), torch.randn(7, 3, 16, 16).double()]
    keep = [
        torch.stack([torch.stack([torch.randperm(n)[:s].sort().values for _ in range(2)]) for _ in range(3)])
        for n, s in ((5, 1 + seed), (7, 7 - seed))
    ]
    out = vit(crops, keep=keep)
    dense = [dense_forward(vit, images, rows) for images, rows in zip(crops, keep, strict=True)]
    weights = [torch.randn(d.shape).double() for d in dense]
    for o, d in zip(out, dense, strict=True):
        torch.testing.assert_close(o.cls, d[:, 0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(o.patches, d[:, 1:], rtol=1e-10, atol=1e-10)
    sum((d * w).sum() for d, w in zip(dense, weights, strict=True)).backward()
    expected = {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}
    vit.zero_grad()
    sum((o.cls * w[:, 0]).sum() + (o.patches * w[:, 1:]).sum() for o, w in zip(out, weights, strict=True)).backward()
    for name, value in expected.items():
        torch.testing.assert_close(dict(vit.named_parameters())[name].grad, value, rtol=1e-9, atol=1e-9)


def test_drop_path_saves_the_compute_of_the_rows_it_drops() -> None:
    vit = tiny()
    images = torch.randn(8, 3, 32, 32)
    seen = []
    for block in vit.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
        block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    vit([images], keep=[torch.arange(2).expand(3, 2, 2)])
    assert seen == [2 * 17] * 6


def test_checkpointed_blocks_see_the_same_rows() -> None:
    vit = tiny(drop_path=0.5)
    images = torch.randn(6, 3, 32, 32)
    keep = [torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(2)]) for _ in range(3)])]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            for block in vit.blocks:
                forward = block.forward
                block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
        vit.zero_grad()
        vit([images], keep=keep)[0].cls.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vit.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_autocast_and_bf16_weights_run() -> None:
    vit = tiny(registers=1)
    keep = [torch.zeros(3, 2, 1, dtype=torch.int64)]
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    expected = vit([images], masks=[mask], keep=keep)[0].cls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(vit([images], masks=[mask], keep=keep)[0].cls.float(), expected, rtol=0.1, atol=0.1)
        out = vit.bfloat16()([images], masks=[mask], keep=keep)[0].cls  # as FSDP2 hands weights out
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
