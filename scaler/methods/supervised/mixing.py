"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) by timm, the same on every layout.

timm draws from numpy's global generator, whose streams numpy keeps for ever. Each group of `group_size` consecutive
images of the global batch is a batch of timm's (the first is mixed with the last, …), with the generator seeded by
(seed, step, group) meanwhile: which images are mixed, and how, depends on neither ranks nor micro-batches.

Only the draws are timm's. What it does with them group by group and image by image, and by tensors that it makes of
Python's numbers, is here a handful of operations on all images, after one copy of all numbers to the device:

    image  <- own · image + other · partner, and the partner's pixels inside the box
    target <- own' · one-hot of its label + other' · one-hot of the partner's

Mixed images have a box without pixels, images with a box have own = 1 and other = 0. Shares are rounded where timm
rounds them, so that fp32 images are timm's bit for bit.

Shapes: m images, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor

from scaler.methods.supervised.boxes import inside, sides
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.drop_path import check_groups
from scaler.transfer import send_together
from shards.random import keyed_bits

_MODES = {"group": "batch", "pair": "pair", "image": "elem"}  # timm's names


def make_mixup(settings: SupervisedSettings, *, label_smoothing: float = 0.0) -> Mixup | None:
    """What the settings ask for, if anything; ours leaves label smoothing to the loss."""
    if not settings.mixes:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.cutmix_share,
        mode=_MODES[settings.mix_by],
        label_smoothing=label_smoothing,
        num_classes=settings.num_classes,
    )


def mix_(
    mixup: Mixup, images: Tensor, labels: Tensor, *, positions: Tensor, group_size: int, seed: int, step: int
) -> Tensor:
    """Mix images at these positions of the global batch in place, without waiting for their device.

    Args:
        images: float [m, 3, h, w]; half-precision ones are mixed in fp32, and rounded.
        labels, positions: int64 [m], on the CPU.

    Returns:
        Targets, float32 [m, c], on the device of the images.

    Raises:
        ValueError: the micro-batch cuts through a group.
    """
    groups = check_groups(positions.numpy(), group_size=group_size)
    height, width = images.shape[-2:]
    drawn = [
        Drawn.of(mixup, int(key), size=group_size, height=height, width=width) for key in _keys(groups, seed, step)
    ]
    shares, boxes = np.concatenate([d.shares for d in drawn], axis=1), np.concatenate([d.boxes for d in drawn])
    both = torch.stack([labels, labels.view(-1, group_size).flip(1).flatten()])  # [2, m]: own, partners'
    sent = send_together([torch.from_numpy(shares), both, *sides(boxes, height=height, width=width)], images.device)
    (own, other, own_target, other_target), both, rows, columns = sent
    partners = images.view(-1, group_size, *images.shape[1:]).flip(1).view(images.shape)
    mixed: Tensor = images * own.view(-1, 1, 1, 1)
    mixed.add_(partners * other.view(-1, 1, 1, 1))
    if boxes.any():
        mixed = torch.where(inside(rows, columns), partners, mixed)
    images.copy_(mixed)
    hits = both[:, :, None] == torch.arange(mixup.num_classes, device=images.device)  # [2, m, c]
    return own_target[:, None] * hits[0] + other_target[:, None] * hits[1]


@dataclass(frozen=True)
class Drawn:
    """What timm draws for a group of images.

    Attributes:
        shares: float32 [4, images], of its own and the partner's pixels (1 and 0 of an image with a box), and of its
            own and the partner's target.
        boxes: int64 [images, 4], top, bottom, left and right of what comes from the partner; zeros: nothing.
    """

    shares: NDArray[np.float32]
    boxes: NDArray[np.int64]

    @classmethod
    def of(cls, mixup: Mixup, key: int, *, size: int, height: int, width: int) -> Drawn:
        """By timm's generator, seeded with 32 bits, in timm's order: all shares, then box after box."""
        boxes = np.zeros((size, 4), dtype=np.int64)
        with _numpy_seeded(key):
            if mixup.mode == "batch":
                share, cuts = mixup._params_per_batch()
                if cuts and share != 1.0:
                    boxes[:], share = cutmix_bbox_and_lam((height, width), share, correct_lam=mixup.correct_lam)
                targets, cut = np.full(size, share), np.full(size, cuts)
            else:
                count = size // 2 if mixup.mode == "pair" else size
                targets, cut = mixup._params_per_elem(count)  # float32
                for i in np.flatnonzero(cut & (targets != 1.0)):
                    box, targets[i] = cutmix_bbox_and_lam((height, width), targets[i], correct_lam=mixup.correct_lam)
                    boxes[i] = box
                if mixup.mode == "pair":  # the other half are the partners, from the last to the first
                    targets, cut = np.concatenate([targets, targets[::-1]]), np.concatenate([cut, cut[::-1]])
                    boxes[count:] = boxes[:count][::-1]
        own, other = np.where(cut, 1.0, targets), np.where(cut, 0.0, 1 - targets)
        return cls(np.stack([own, other, targets, 1 - targets]).astype(np.float32), boxes)


def _keys(groups: NDArray[np.int64], seed: int, step: int) -> NDArray[np.uint64]:
    """32 bits for every group."""
    return keyed_bits("mixup", seed, step, groups) >> np.uint64(32)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Numpy's global generator as seeded by 32 bits; afterwards as before."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
