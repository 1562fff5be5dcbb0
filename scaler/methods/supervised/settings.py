"""The recipe's `method` section of supervised training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from scaler.methods.pooled_settings import Fraction, PooledSettings


class SupervisedSettings(PooledSettings):
    """Settings of `Supervised`."""

    name: Literal["supervised"] = "supervised"

    # Colours, applied to every image
    color_jitter: float = Field(0.0, ge=0, le=1, description="brightness, contrast, saturation: factors in 1 ± this")
    hue: float = Field(0.0, ge=0, le=0.5, description="turns of the colour circle, either way")
    grayscale_probability: Fraction = 0.0
    erase_probability: Fraction = Field(0.0, description="share of images that lose a random rectangle")

    # Images mixed with one another, in groups of `group_size`
    mixup: float = Field(0.0, ge=0, description="shares are drawn from Beta(this, this); 0: no mixup")
    cutmix: float = Field(0.0, ge=0, description="areas are drawn from Beta(this, this); 0: no CutMix")
    mix_by: Literal["group", "pair", "image"] = Field("group", description="what has a share of its own")
    mix_probability: Fraction = Field(1.0, description="how many groups, pairs or images (`mix_by`) are mixed")
    cutmix_share: Fraction = Field(0.5, description="how many of them by CutMix, where mixup is on too")

    # Head and loss
    num_classes: int = Field(ge=2, description="labels run from 0 to this, itself not among them")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target that goes to all classes alike")

    # Fine-tuning
    freeze_backbone: bool = Field(False, description="train the classifier only, on features of evaluation mode")
    backbone_lr_scale: float = Field(1.0, gt=0, description="learning rate of the backbone, of the classifier's")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return bool(self.mixup or self.cutmix) and self.mix_probability > 0

    @model_validator(mode="after")
    def _check_mixing(self) -> SupervisedSettings:
        if self.mixes and self.group_size % 2:
            raise ValueError(f"images are mixed in pairs of a group: group_size {self.group_size} must be even")
        wanted = {"mix_by": not self.mixes, "mix_probability": not (self.mixup or self.cutmix)}
        self._refuse(wanted, "without mixup or cutmix")
        self._refuse({"cutmix_share": not (self.mixup and self.cutmix)}, "unless mixup and cutmix are both on")
        return self

    @model_validator(mode="after")
    def _check_frozen(self) -> SupervisedSettings:
        if self.freeze_backbone:
            names = ("drop_path", "backbone_lr_scale", "frozen_patch_embed")
            self._refuse(dict.fromkeys(names, True), "with freeze_backbone")
        return self

    def _refuse(self, useless: dict[str, bool], why: str) -> None:
        """Refuse settings that would change nothing, if they are not at their defaults."""
        fields = type(self).model_fields
        for name in (name for name, is_useless in useless.items() if is_useless):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect {why}; leave it out")
