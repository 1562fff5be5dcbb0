"""Scale self-supervised learning of images, from Python as from the command line.

    import scaler

    run = scaler.train("simclr/demo", shards="shards/train", dir="runs/first", processes=2, **{"optim.lr": 1e-3})
    run.plot()
    features, labels = run.features("shards/val")

    run = scaler.Run("runs/first")                       # one that is there already
    model = scaler.load("timm:vit_small_patch14_dinov2") # anything that `scaler eval` opens

Importing this imports nothing else: what is asked for comes when it is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaler.notebook import Run, load

__all__ = ["Run", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'scaler' has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # which tqdm says wherever ipywidgets are not
        if name == "train":
            return importlib.import_module("scaler.train")
        return getattr(importlib.import_module("scaler.notebook"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
