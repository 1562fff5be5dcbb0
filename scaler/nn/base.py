"""What every backbone offers to the methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """Features of n images; a tuple, since ZeRO-3 and FSDP2 gather weights for the backward of tensors they can see.

    Attributes:
        cls: [n, d], the image's feature: class token after the final norm, or the global average of a CNN.
        patches: [n, p, d], one feature per patch (or per cell of a CNN's last map, row by row).
    """

    cls: Tensor
    patches: Tensor


class Backbone(nn.Module):
    """An image encoder without classifier; made by `scaler.nn.backbones.build_backbone`.

    Attributes:
        num_features: width d of the features.
        patch_size: pixels of a patch's side; None where there are no patches.
        fixed_size: whether images must be of the size that it was built for.
        channels_last: whether it runs faster on images whose channels lie next to one another in memory, which
            convolutions on tensor cores want; results are the same.
        is_vit: whether crops of all sizes share one pass, and masks and kept rows are understood.
        drop_path: share of rows that skip a residual branch while training.
        blocks: called, it lists the units to shard, checkpoint and compile.
    """

    num_features: int
    patch_size: int | None
    fixed_size: bool = False
    channels_last: bool = False
    is_vit: bool
    drop_path: float
    blocks: Callable[[], list[nn.Module]]

    def forward(
        self,
        crops: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Features of several batches of crops, each of its own size.

        Args:
            crops: float [n_k, 3, h_k, w_k] each.
            masks: for each batch, bool [n_k, patches] (True: the mask token takes the patch's place) or None.
            keep: for each batch, int64 [blocks, 2, s_k]: the rows that run the two residual branches of every block
                (`scaler.nn.drop_path.kept_rows`); None: all rows.
        """
        raise NotImplementedError

    def pooled(self, images: Tensor) -> Tensor:
        """The feature [n, d] of normalised images [n, 3, h, w] that heads and evaluations use."""
        return self([images])[0].cls
