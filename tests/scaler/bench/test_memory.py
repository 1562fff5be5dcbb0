"""The memory of a step on fake tensors: what is kept for the backward pass grows with the images, and can be traded."""

from __future__ import annotations

from functools import partial

import pytest

from scaler.recipe import Recipe, load_recipe
from tests.scaler.bench.memory import ours, peak_bytes, reference


def recipe(images: int, checkpointing: str = "none") -> Recipe:
    words = [
        "method.backbone=vit_tiny_patch16_224",
        "method.depth=3",
        "method.num_prototypes=4096",
        "method.drop_path=0",
        "method.group_size=4",
        "data.image_size=112",
        f"data.global_batch_size={images}",
        "strategy.precision=bf16",
        f"strategy.activation_checkpointing={checkpointing}",
    ]
    return load_recipe("dinov2/demo", overrides=words, shards="none")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_peaks_are_those_of_the_kept_activations() -> None:
    peaks = {
        (images, checkpointing): peak_bytes(partial(ours, recipe(images, checkpointing), images))
        for images, checkpointing in ((32, "none"), (16, "none"), (16, "selective"), (16, "blocks"))
    }
    more = peaks[32, "none"] - peaks[16, "none"]
    # Of 16 images, 2 crops of 197 tokens and 2 of 5; three blocks of 192 channels, of which a block keeps some 20 bf16
    # numbers a token and channel: norms, queries, keys, values, attention, and four times as many around the GELU.
    kept = 16 * (2 * 197 + 2 * 5) * 3 * 192 * 2
    assert 17 * kept < more < 22 * kept, more / kept
    assert peaks[16, "blocks"] < peaks[16, "selective"] < peaks[16, "none"]
    assert peaks[16, "none"] < peak_bytes(partial(reference, recipe(16), 16))
