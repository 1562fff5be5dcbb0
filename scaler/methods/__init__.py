"""The methods by name; a new one is a folder here, a line below and a recipe."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaler.methods.base import Method

METHODS = {
    "simclr": "scaler.methods.simclr.method:SimCLR",
    "dinov2": "scaler.methods.dinov2.method:DINOv2",
    "supervised": "scaler.methods.supervised.method:Supervised",
}


def method_class(name: str) -> type[Method]:
    """The class of a method in `METHODS`; imported on use, so that reading a recipe's data section costs nothing."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
