"""The methods by name; a new one is a folder here, a line below and a recipe."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from scaler.methods.base import Method

METHODS = {  # what a recipe's `method` section may say (imports no torch), and the method itself
    "simclr": ("scaler.methods.simclr.settings:SimCLRSettings", "scaler.methods.simclr.method:SimCLR"),
    "dinov2": ("scaler.methods.dinov2.settings:Settings", "scaler.methods.dinov2.method:DINOv2"),
    "supervised": (
        "scaler.methods.supervised.settings:SupervisedSettings",
        "scaler.methods.supervised.method:Supervised",
    ),
}


def method_settings(name: str) -> type[BaseModel]:
    """What the `method` section of a recipe of this method may say."""
    settings: type[BaseModel] = _import(METHODS[name][0])
    return settings


def method_class(name: str) -> type[Method]:
    """The class of a method in `METHODS`; imported on use, since it brings torch and timm."""
    method: type[Method] = _import(METHODS[name][1])
    return method


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
