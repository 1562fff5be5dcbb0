"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) by timm, the same on every layout.

timm draws from numpy's global generator, whose streams numpy keeps for ever. Each group of `group_size` consecutive
images of the global batch is a batch of timm's (the first is mixed with the last, …), with the generator seeded by
(seed, step, group) meanwhile: which images are mixed, and how, depends on neither ranks nor micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.drop_path import check_groups
from shards.random import keyed_bits

_MODES = {"group": "batch", "pair": "pair", "image": "elem"}  # timm's names


def make_mixup(settings: SupervisedSettings) -> Mixup | None:
    """What the settings ask for, if anything; label smoothing is left to the loss."""
    if not settings.mixes:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.cutmix_share,
        mode=_MODES[settings.mix_by],
        label_smoothing=0.0,
        num_classes=settings.num_classes,
    )


def mix_(
    mixup: Mixup, images: Tensor, labels: Tensor, *, positions: Tensor, group_size: int, seed: int, step: int
) -> Tensor:
    """Mix images [m, 3, h, w] at these positions of the global batch in place; returns their targets, float [m, c].

    Raises:
        ValueError: the micro-batch cuts through a group.
    """
    groups = check_groups(positions.cpu().numpy(), group_size=group_size)
    targets = []
    for group, x, y in zip(groups, images.split(group_size), labels.split(group_size), strict=True):
        with _numpy_seeded(int(keyed_bits("mixup", seed, step, int(group))) >> 32):
            targets.append(mixup(x, y)[1])  # the images are a view, and changed where they are
    return torch.cat(targets)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Numpy's global generator as seeded by 32 bits; afterwards as before."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
