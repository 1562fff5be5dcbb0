"""What is known to go wrong with SimCLR: before a run, from its sizes, and during one, from a logged row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from scaler.methods.simclr.settings import SimCLRSettings
from scaler.methods.unread import unread

_SMALLEST_BATCH = 128  # published: 256 to 8192 images; each halving below 4096 cost accuracy
_GRACE = 100  # steps, the warm-up's first


def advice(settings: SimCLRSettings, *, num_samples: int | None, global_batch_size: int) -> Iterator[str]:
    """Lines of `Method.advice`."""
    yield (
        f"simclr: {2 * global_batch_size - 2} negatives per anchor, of the whole global batch of {global_batch_size} "
        "images, whatever the number of ranks and micro-batches"
    )
    if global_batch_size < _SMALLEST_BATCH:
        yield (
            f"warning: {2 * global_batch_size - 2} negatives make an easy task (published: 510 and more); raise "
            "data.global_batch_size, to 256 if you can: strategy.micro_batch_size keeps the memory, for backbones "
            "without batch norm"
        )
    if num_samples is not None and global_batch_size > num_samples:
        yield (
            f"warning: a global batch of {global_batch_size} images holds each of the {num_samples} images more than "
            f"once, so that they are their own negatives; set data.global_batch_size to {num_samples} at most"
        )
    s = settings
    reasons = {
        "jitter_probability is 0": ("color_strength", "brightness", "contrast", "saturation", "hue")
        * (not s.jitter_probability),
        "blur_probability is 0": ("blur_kernel",) * (not s.blur_probability),
        "blur_kernel is 0": ("blur_probability",) * (s.blur_kernel == 0),
        "the head has one layer": ("head_hidden",) * (s.head_layers == 1),
        "there is no drop path": ("group_size",) * (not s.drop_path),
    }
    yield from unread(s, reasons)


def symptoms(settings: SimCLRSettings, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Names and sentences of `Method.symptoms`."""
    if row["step"] <= _GRACE:
        return
    # The spread is 1 when all channels are used alike, which the loss asks for: trained models have 0.8 to 1.
    if row["embedding_std"] < 0.1:
        yield (
            "collapsed_embeddings",
            f"embedding_std is {row['embedding_std']:.2g}: all views have nearly the same embedding; lower optim.lr, "
            "lengthen schedule.warmup, or set method.head_batch_norm=true",
        )
    # Guessing among 2B - 1 views costs their logarithm. Cosines differ by 2 at most, so a loss can lie up to
    # 2 / temperature below it; a hundredth of that is no progress.
    chance = math.log(row["negatives"] + 1)
    if row["loss/ntxent"] > chance - 0.02 / settings.temperature:
        yield (
            "guessing",
            f"loss/ntxent is {row['loss/ntxent']:.4g}, no less than that of guessing among {row['negatives'] + 1:.0f} "
            f"views ({chance:.4g}); check optim.lr, weaken the colours, or lower method.temperature",
        )
