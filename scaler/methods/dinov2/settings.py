"""The recipe's `method` section of DINOv2; defaults are those of the published short recipe, but for
Sinkhorn-Knopp in place of softmax centring and the blur of the paper."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from scaler.schedules import Duration


def _duration(value: Any) -> str:
    return str(Duration.parse(value))


DurationText = Annotated[str, BeforeValidator(_duration)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Interval = Annotated[tuple[Fraction, Fraction], Field(description="low, high")]


class Settings(BaseModel):
    """Settings of `DINOv2`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["dinov2"] = "dinov2"

    # Backbone
    backbone: str = Field("vit_large_patch16_224", description="a plain ViT of timm")
    weights: str | None = Field(
        None,
        description="what student and teacher start from: timm, timm:NAME, a file of weights, a run or a checkpoint "
        "(of DINOv2 with its heads and centres); null: random weights",
    )
    patch_size: int | None = Field(None, gt=0, description="pixels; null: the backbone's own")
    depth: int | None = Field(None, gt=0, description="number of blocks; null: the backbone's own")
    embed_dim: int | None = Field(None, gt=0, description="width; null: the backbone's own")
    num_heads: int | None = Field(None, gt=0, description="attention heads; null: the backbone's own")
    registers: int = Field(0, ge=0, description="register tokens")
    layer_scale: float | None = Field(1e-5, gt=0, description="initial value; null: the backbone's own, mostly none")
    drop_path: float = Field(0.3, ge=0, lt=1, description="share of a group's rows that skip a residual branch")
    initial_weights: Literal["published", "fan_in"] = Field(
        "published", description="fan_in: deviation 1/√fan_in instead of 0.02, for ViTs narrower than about 200"
    )
    group_size: int = Field(64, gt=0, description="images that KoLeo and drop path work on together")

    # Crops
    num_local_crops: int = Field(8, ge=0)
    local_size: int = Field(96, gt=0, description="pixels of a local crop")
    global_scale: Interval = (0.32, 1.0)
    local_scale: Interval = (0.05, 0.32)
    flip: Fraction = Field(0.5, description="share of crops that are mirrored; 0 where left and right have a meaning")

    # Colour
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.2, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    jitter_probability: Fraction = 0.8
    grayscale_probability: Fraction = 0.2
    blur: Literal["paper", "released"] = Field(
        "paper",
        description="probability on global 1 / global 2 / local crops: 1.0 / 0.1 / 0.5 in the paper; "
        "0 / 0.9 / 0.5 is what the released code really applies",
    )
    blur_kernel: int = Field(9, ge=0, description="taps, odd; 0: no blur")
    solarize_probability: Fraction = Field(0.2, description="on the second global crop")

    # Masks
    mask_ratio: Interval = (0.1, 0.5)
    mask_probability: Fraction = Field(0.5, description="share of the global crops that get a mask")

    # Heads
    num_prototypes: int = Field(65536, gt=1)
    head_hidden: int = Field(2048, gt=0)
    head_bottleneck: int = Field(256, gt=0)
    separate_heads: bool = Field(False, description="iBOT has a head of its own")

    # Losses
    dino_weight: float = Field(1.0, ge=0)
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0)
    student_temperature: Temperature = 0.1
    warmup_teacher_temperature: Temperature = 0.04
    teacher_temperature: Temperature = 0.07
    teacher_temperature_warmup: DurationText = "30 epochs"
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    center_momentum: float = Field(0.9, ge=0, lt=1, description="of the centre, with softmax centring")

    # Gram anchoring (DINOv3): patch similarities stay as an earlier teacher had them
    gram_weight: float = Field(0.0, ge=0, description="of the loss; 0: none")
    gram_teacher: str = Field(
        "self", description="self: this run's own teacher, as it is at gram_start; else weights, as method.weights"
    )
    gram_start: DurationText = Field("0 steps", description="when the loss sets in")
    gram_refresh: DurationText | None = Field(
        None, description="with self: take the teacher anew each time this much has passed; null: never"
    )
    gram_size_factor: int = Field(1, ge=1, description="the gram teacher sees the global crops so many times as large")

    # Teacher and head schedules
    momentum: Fraction = 0.992
    momentum_end: Fraction = 1.0
    freeze_last_layer: DurationText = Field("1 epochs", description="the heads' last layer keeps still this long")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        for name in ("global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is [low, high], got [{low}, {high}]: swap them")
        if self.blur_kernel and self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel {self.blur_kernel} must be odd, so that it has a middle (0: no blur)")
        return self

    @model_validator(mode="after")
    def _check_gram(self) -> Settings:
        fields = type(self).model_fields
        names = ("gram_teacher", "gram_start", "gram_refresh", "gram_size_factor")
        set_ = [name for name in names if getattr(self, name) != fields[name].default]
        if set_ and not self.gram_weight:
            raise ValueError(f"{', '.join(set_)}: without effect while gram_weight is 0; set it (published: 2)")
        if self.gram_teacher != "self" and self.gram_refresh:
            raise ValueError("gram_refresh takes this run's teacher anew; leave it out, or set gram_teacher to self")
        if self.gram_refresh is not None and not Duration.parse(self.gram_refresh).amount:
            raise ValueError(f"gram_refresh {self.gram_refresh} is no time; leave it out to take the teacher once")
        if self.gram_weight and self.gram_teacher == "self" and self.weights is None and self.gram_start == "0 steps":
            raise ValueError(
                "the gram teacher would be the random initial one; set gram_start to a later step, weights to start "
                "from, or gram_teacher to the weights of an earlier teacher"
            )
        return self
