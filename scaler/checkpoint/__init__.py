"""Checkpoints: one format whatever the strategy, written by all ranks in the background, verified when read.

    RUN/checkpoints/step-00000100/                      or any fsspec URL as `checkpoint.dir`
        rank-00000-1f9a3c20-7.safetensors               the flat ranges that rank 0 had
        manifest.json                                   every tensor's shape, dtype and ranges, each file's size and
                                                        sha256, recipe, data fingerprint, images seen

Every strategy's piece of a tensor is a contiguous range of the flattened tensor, so nothing is gathered to save, and a
reader on any other layout takes just the ranges it needs. A checkpoint is complete when its manifest exists, which is
written last. Nothing is unpickled on load.

places.py reads and writes folders and URLs, container.py the safetensors format, manifest.py finds and checks
checkpoints, saving.py and loading.py move pieces, tools.py is behind `scaler checkpoint`.
"""

from scaler.checkpoint.loading import load_method, load_pieces
from scaler.checkpoint.manifest import (
    complete_checkpoints,
    read_manifest,
    resolve_checkpoint,
    run_checkpoints,
    verify,
)
from scaler.checkpoint.saving import Checkpointer
from shards.places import Location, locate

__all__ = [
    "Checkpointer",
    "Location",
    "complete_checkpoints",
    "load_method",
    "load_pieces",
    "locate",
    "read_manifest",
    "resolve_checkpoint",
    "run_checkpoints",
    "verify",
]
