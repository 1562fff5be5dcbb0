"""The recipe's `method` section of supervised training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scaler.methods.pooled import Fraction, PooledSettings


class SupervisedSettings(PooledSettings):
    """Settings of `Supervised`."""

    name: Literal["supervised"] = "supervised"

    # Colours, applied to every image
    color_jitter: float = Field(0.0, ge=0, le=1, description="brightness, contrast, saturation: factors in 1 ± this")
    hue: float = Field(0.0, ge=0, le=0.5, description="turns of the colour circle, either way")
    grayscale_probability: Fraction = 0.0

    # Head and loss
    num_classes: int = Field(ge=2, description="labels run from 0 to this, itself not among them")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target that goes to all classes alike")
