"""The recipe's `method` section of SimCLR; defaults are the published ResNet-50 recipe on ImageNet-1k."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class SimCLRSettings(BaseModel):
    """Settings of `SimCLR`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["simclr"] = "simclr"

    # Backbone
    backbone: str = Field("resnet50", description="any timm model")
    small_stem: bool = Field(False, description="ResNets: a 3x3 stem without stride or pooling, for images of 32 px")
    patch_size: int | None = Field(None, gt=0, description="ViTs: pixels; null: the backbone's own")
    depth: int | None = Field(None, gt=0, description="ViTs: number of blocks; null: the backbone's own")
    embed_dim: int | None = Field(None, gt=0, description="ViTs: width; null: the backbone's own")
    num_heads: int | None = Field(None, gt=0, description="ViTs: attention heads; null: the backbone's own")
    initial_weights: Literal["published", "fan_in", "moco_v3"] = Field(
        "published", description="ViTs: DINOv2's, their relatives for narrow models, or MoCo-v3's (q, k, v separate)"
    )
    frozen_patch_embed: bool = Field(False, description="ViTs: the patch embedding stays at its initial weights")
    sincos_positions: bool = Field(False, description="ViTs: fixed two-dimensional sine-cosine positions")
    drop_path: float = Field(0.0, ge=0, lt=1, description="share of rows that skip a residual branch")
    group_size: int = Field(64, gt=0, description="ViTs: consecutive images among which drop path chooses its rows")

    # Views
    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="area of a crop: low, high")
    flip: Fraction = Field(0.5, description="share of views that are mirrored; 0 where left and right have a meaning")
    color_strength: float = Field(1.0, ge=0, le=2.5, description="s: jitter of 0.8s, 0.8s, 0.8s and 0.2s")
    jitter_probability: Fraction = 0.8
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_kernel: int | Literal["auto"] = Field("auto", description="taps, odd; auto: a tenth of the image; 0: no blur")
    normalize: bool = Field(True, description="by ImageNet's mean and deviation; false: pixels stay in [0, 1]")

    # Head and loss
    head_layers: int = Field(3, ge=1, description="2 in the first paper, 3 in the second")
    head_hidden: int | None = Field(None, gt=0, description="width of the hidden layers; null: the backbone's")
    head_out: int = Field(128, gt=0)
    head_batch_norm: bool = True
    temperature: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _check(self) -> SimCLRSettings:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale is [low, high] with 0 < low <= high, got {list(self.crop_scale)}")
        if self.blur_kernel != "auto" and (self.blur_kernel < 0 or (self.blur_kernel and self.blur_kernel % 2 == 0)):
            raise ValueError(f"blur_kernel {self.blur_kernel} must be odd, so that it has a middle (0: no blur)")
        return self
