"""The settings that SimCLR and supervised training share; importing them brings no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class PooledSettings(BaseModel):
    """Settings of the backbone and of how images are cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    # Backbone
    backbone: str = Field("resnet50", description="any timm model")
    weights: str | None = Field(
        None,
        description="what the backbone starts from: timm, timm:NAME, a file of weights, a run or a checkpoint; "
        "null: random weights",
    )
    small_stem: bool = Field(False, description="ResNets: a 3x3 stem without stride or pooling, for images of 32 px")
    patch_size: int | None = Field(None, gt=0, description="ViTs: pixels; null: the backbone's own")
    depth: int | None = Field(None, gt=0, description="ViTs: number of blocks; null: the backbone's own")
    embed_dim: int | None = Field(None, gt=0, description="ViTs: width; null: the backbone's own")
    num_heads: int | None = Field(None, gt=0, description="ViTs: attention heads; null: the backbone's own")
    layer_scale: float | None = Field(
        None, gt=0, description="ViTs: LayerScale's initial value; null: the backbone's own"
    )
    registers: int = Field(0, ge=0, description="ViTs: register tokens")
    initial_weights: Literal["published", "fan_in", "moco_v3"] = Field(
        "published", description="ViTs: DINOv2's, their relatives for narrow models, or MoCo-v3's (q, k, v separate)"
    )
    frozen_patch_embed: bool = Field(False, description="ViTs: the patch embedding stays at its initial weights")
    sincos_positions: bool = Field(False, description="ViTs: fixed two-dimensional sine-cosine positions")
    drop_path: float = Field(0.0, ge=0, lt=1, description="share of rows that skip a residual branch")
    group_size: int = Field(
        64, gt=0, description="consecutive images among which a ViT's drop path chooses its rows, and images are mixed"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="momentum of an average of the weights, which is what is evaluated; null: none"
    )

    # Views
    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="area of a crop: low, high")
    flip: Fraction = Field(0.5, description="share of views that are mirrored; 0 where left and right have a meaning")
    normalize: bool = Field(True, description="by ImageNet's mean and deviation; false: pixels stay in [0, 1]")

    @model_validator(mode="after")
    def _check_crop(self) -> PooledSettings:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale is [low, high] with 0 < low <= high, got {list(self.crop_scale)}")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> PooledSettings:
        if self.weights is not None and self.initial_weights != "published":
            raise ValueError(
                f"initial_weights={self.initial_weights} has no effect with weights, from which the whole backbone "
                "comes; leave it out"
            )
        return self
