"""The attention that is drawn is that of the block, by the formula of its parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scaler.evals.checkpoints import EvaluationModel
from scaler.show.attention import attention_sheet, class_attention, heat
from shards.index import ShardIndex
from tests.scaler.show.conftest import make_model

PIXELS = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_attention_of_the_class_token_is_that_of_the_formula(vit: EvaluationModel) -> None:
    """softmax(q k' / √d) in float64 from the parameters; with its values it gives the block's own output."""
    weights = class_attention(vit, PIXELS, batch_size=2)
    assert weights.shape == (5, 3, 1 + 2 + 36)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5, 3))
    model = vit.method.evaluated_backbone().double()
    try:
        with torch.no_grad():
            x = model.embed((PIXELS.double() / 255 - 0.5) / 0.25)
            x = model.blocks[0](x.flatten(0, 1), [(5, 39)]).view_as(x)
            block = model.blocks[1]
            q, k, v = block.attn.qkv(block.norm1(x)).view(5, 39, 3, 3, 12).unbind(2)
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
            scores = torch.einsum("nhd,nthd->nht", q[:, 0], k) / math.sqrt(12)
            expected = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
            mixed = block.attn.proj(torch.einsum("nht,nthd->nhd", weights.double(), v).flatten(1))
            after = x[:, 0] + mixed
            after = after + block.mlp(block.norm2(after))
            whole = block(x.flatten(0, 1), [(5, 39)]).view_as(x)[:, 0]
    finally:
        model.float()
    torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-4)
    assert not block.attn.q_norm._forward_hooks and not block.attn.k_norm._forward_hooks


def test_the_sheet_has_a_map_for_the_mean_and_each_head(vit: EvaluationModel, index: ShardIndex) -> None:
    sheet = np.asarray(attention_sheet(vit, index, num=3, what="vit")).astype(int)
    bright = np.array(heat(torch.ones(1, 1)))[0, 0]
    maxima = (sheet == bright).all(axis=-1)  # each map has its maximum somewhere
    tops = [row for row in range(1, len(sheet)) if (sheet[row, 20:180].min(-1) < 250).mean() > 0.95
            and not (sheet[row - 1, 20:180].min(-1) < 250).mean() > 0.95]  # fmt: skip
    assert len(tops) == 3
    for top in tops:
        columns = [maxima[top : top + 160, 20 + 176 * column : 180 + 176 * column] for column in range(1, 5)]
        assert [int(column.sum()) >= 40 * 40 for column in columns] == [True] * 4


def test_models_without_a_class_token_are_refused(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="only plain ViTs"):
        attention_sheet(make_model("test_resnet", image_size=32), index, num=3)
