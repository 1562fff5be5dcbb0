"""The recipe's `method` section of SimCLR; defaults are the published ResNet-50 recipe on ImageNet-1k."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from scaler.methods.pooled_settings import Fraction, PooledSettings


class SimCLRSettings(PooledSettings):
    """Settings of `SimCLR`."""

    name: Literal["simclr"] = "simclr"

    # Views
    color_strength: float = Field(1.0, ge=0, le=2.5, description="s: jitter of 0.8s, 0.8s, 0.8s and 0.2s")
    brightness: float | None = Field(None, ge=0, description="jitter; null: 0.8 times color_strength")
    contrast: float | None = Field(None, ge=0, description="jitter; null: 0.8 times color_strength")
    saturation: float | None = Field(None, ge=0, description="jitter; null: 0.8 times color_strength")
    hue: float | None = Field(None, ge=0, le=0.5, description="jitter; null: 0.2 times color_strength")
    jitter_probability: Fraction = 0.8
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_kernel: int | Literal["auto"] = Field("auto", description="taps, odd; auto: a tenth of the image; 0: no blur")

    # Head and loss
    head_layers: int = Field(3, ge=1, description="2 in the first paper, 3 in the second")
    head_hidden: int | None = Field(None, gt=0, description="width of the hidden layers; null: the backbone's")
    head_out: int = Field(128, gt=0)
    head_batch_norm: bool = True
    temperature: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _check_blur(self) -> SimCLRSettings:
        if self.blur_kernel != "auto" and (self.blur_kernel < 0 or (self.blur_kernel and self.blur_kernel % 2 == 0)):
            raise ValueError(f"blur_kernel {self.blur_kernel} must be odd, so that it has a middle (0: no blur)")
        return self

    @model_validator(mode="after")
    def _check_jitter(self) -> SimCLRSettings:
        strengths = ("brightness", "contrast", "saturation", "hue")
        if self.color_strength != 1 and all(getattr(self, name) is not None for name in strengths):
            raise ValueError(
                f"color_strength {self.color_strength} has no effect where {', '.join(strengths)} are all given; leave "
                "it out, or one of them"
            )
        return self
