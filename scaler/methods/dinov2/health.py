"""What is known to go wrong with DINOv2: before a run, from its sizes, and during one, from a logged row.

Most reports of a flat loss, a plateau or NaN are of the published recipe on a fraction of its images, batch or length
(facebookresearch/dinov2, issues 143, 298, 314). The limits here lie between what was published and what was reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from scaler.methods.dinov2.settings import Settings
from scaler.methods.unread import unread

# Published: 1.28 million images for 65,536 prototypes, 20 each; reported to fail: 4,000 images, with small batches. On
# the demo's 1,437 images 128 and 8,192 prototypes both learn (400 steps: kNN 49 % and 57 %, 2026-11-21).
_IMAGES_PER_PROTOTYPE = 1 / 8
# Published: 65,536 prototypes for the 4,096 global crops of a batch, 16 each; reported to plateau: batches of 12 to 32
# images, 1,000 each and more. The demo learns with 43 (the 8,192 above), and with 4 in a batch of 16 images.
_PROTOTYPES_PER_CROP = 48
_BASE_LR = 4e-3  # AdamW's, times √(batch/1024): the largest that was published

_GRACE = 500  # steps: with LayerScale from 1e-5 all images have one feature at first (embedding_std 0.002, entropy 1)


def advice(
    settings: Settings, *, num_samples: int | None, global_batch_size: int, steps: Callable[[str], int], optim: Any
) -> Iterator[str]:
    """Lines of `Method.advice`."""
    s, batch, total = settings, global_batch_size, steps("total")
    if num_samples is not None and num_samples < _IMAGES_PER_PROTOTYPE * s.num_prototypes:
        fitting = max(64, 2 ** round(math.log2(num_samples)))
        yield (
            f"warning: {num_samples} images for {s.num_prototypes} prototypes: nearly all of them belong to no image "
            f"(published: one for 20 images); set method.num_prototypes={fitting}, or start from dinov2/small_data"
        )
    if s.num_prototypes > 2 * batch * _PROTOTYPES_PER_CROP:
        yield (
            f"warning: a global batch of {batch} images is small for {s.num_prototypes} prototypes (published: 16 for "
            f"each of its {2 * batch} global crops), and such runs plateau; raise data.global_batch_size (accumulation "
            "gives the same curve: strategy.micro_batch_size), or lower method.num_prototypes"
        )
    usual = _BASE_LR * math.sqrt(batch / 1024)
    if optim.name == "adamw" and optim.scaled_lr(batch) > 2 * usual:
        yield (
            f"warning: the learning rate reaches {optim.scaled_lr(batch):.2g}, where {usual:.2g} is usual for a batch "
            f"of {batch} images; set optim.lr_rule=sqrt_1024 and optim.lr=4e-3 at most"
        )
    reasons = {
        "centring is sinkhorn's": ("center_momentum",) * (s.centering == "sinkhorn"),
        "there are no local crops": ("local_size", "local_scale") * (not s.num_local_crops),
        "no crop is masked": ("mask_ratio", "ibot_weight", "separate_heads") * (not s.mask_probability),
        "blur_kernel is 0": ("blur",) * (not s.blur_kernel),
        "neither drop path nor KoLeo works in groups": ("group_size",) * (not s.drop_path and not s.koleo_weight),
        "jitter_probability is 0": ("brightness", "contrast", "saturation", "hue") * (not s.jitter_probability),
    }
    yield from unread(s, reasons)
    if s.koleo_weight and s.group_size == 1:
        yield "warning: method.koleo_weight has no effect in groups of one image; raise method.group_size"
    if s.momentum == s.momentum_end == 1:
        yield "warning: method.momentum=1 leaves the teacher at its initial weights"
    elif s.momentum < 1 and total * (1 - s.momentum) < 10:
        yield (
            f"warning: with method.momentum={s.momentum} the teacher is the mean of about {1 / (1 - s.momentum):.0f} "
            f"steps, of {total} in all; lower it, to {max(0.5, 1 - 20 / max(1, total)):.2g} for example"
        )
    durations = {"freeze_last_layer": s.freeze_last_layer}
    if s.warmup_teacher_temperature != s.teacher_temperature:
        durations["teacher_temperature_warmup"] = s.teacher_temperature_warmup
    for key, duration in durations.items():
        if (length := steps(duration)) > total:
            yield f"warning: method.{key} is {length} steps, longer than the run's {total}; shorten it alike"


def symptoms(settings: Settings, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Names and sentences of `Method.symptoms`."""
    k = settings.num_prototypes
    if row["step"] <= _GRACE or not row.get("last_layer_lr", 1.0):
        return
    # The feature's spread is 1 when it uses all channels alike; trained models have 0.3 to 1.
    if row["embedding_std"] < 0.02:
        yield (
            "collapsed_features",
            f"embedding_std is {row['embedding_std']:.2g}: all images have nearly the same feature; lower optim.lr, "
            "lengthen schedule.warmup, or raise method.koleo_weight",
        )
    # Of one image's target, over log K. Near 1 it favours no prototype. Near 0 is what sharp targets come to in a
    # healthy run, unless the student has them right for every image, which it can only if they are all the same.
    if row["prototype_entropy"] > 0.99:
        yield (
            "empty_targets",
            f"prototype_entropy is {row['prototype_entropy']:.4f}: the teacher's targets favour no prototype, so there "
            "is nothing to learn; lower method.teacher_temperature and method.warmup_teacher_temperature (0.02 for "
            "narrow models), or method.num_prototypes",
        )
    elif row["prototype_entropy"] < 0.02 and row["loss/dino"] < 0.02 * math.log(k):
        yield (
            "one_prototype",
            f"prototype_entropy is {row['prototype_entropy']:.4f} and loss/dino {row['loss/dino']:.2g}: every image "
            "has the same prototype; set method.centering=sinkhorn, or raise method.teacher_temperature",
        )
    # A student that spreads its guesses evenly pays ln K whatever the targets are. Runs that learn are 2 % below it
    # after a hundred steps; that two crops do not share their first prototype says little where there are many.
    guess = math.log(k)
    if settings.dino_weight and row["loss/dino"] > (0.98 if row["agreement"] < 1.2 / k else 0.995) * guess:
        yield (
            "guessing",
            f"loss/dino is {row['loss/dino']:.4g}, that of guessing among {k} prototypes ({guess:.4g}), and "
            f"student and teacher agree on {row['agreement']:.2g} of the crops; lower or raise optim.lr, raise "
            "data.global_batch_size, or start from weights that have learned (method.weights)",
        )
