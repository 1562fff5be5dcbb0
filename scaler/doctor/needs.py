"""What a run takes of each machine that it is started on."""

from __future__ import annotations

from dataclasses import dataclass

from scaler.recipe import Recipe
from shards.places import without_secrets

_READY = 2  # micro-batches that each loader process keeps ready (`shards.loader`)
_HELD = 3  # others of a process: the one in use, the one on its way to the GPU, the one being pinned


@dataclass(frozen=True)
class Needs:
    """What is counted of a run; the defaults ask for nothing.

    Attributes:
        shards: the local folder that holds index.json; None: there is none, and `unchecked` says why.
        unchecked: why the shards cannot be looked at on each machine; empty: they can.
        folders: local folders that all machines write to.
        checkpoints: of those the one for checkpoints.
        checkpoint_bytes: of one checkpoint; 0: not known.
        num_checkpoints: that lie there at a time, the one that is being written included.
        loader_processes: on a machine.
        loader_bytes: of shared memory (/dev/shm) that they take together.
    """

    shards: str | None = None
    unchecked: str = ""
    folders: tuple[str, ...] = ()
    checkpoints: str | None = None
    checkpoint_bytes: int = 0
    num_checkpoints: int = 0
    loader_processes: int = 0
    loader_bytes: int = 0

    @classmethod
    def of(cls, recipe: Recipe, *, checkpoint_bytes: int, batch_bytes: int, processes: int) -> Needs:
        """Those of a recipe.

        Args:
            recipe: the recipe.
            checkpoint_bytes: of one checkpoint.
            batch_bytes: of the pixels of one micro-batch, as loader processes hand it over.
            processes: that train on a machine.
        """
        data, saved, checkpoints = recipe.data, recipe.checkpoint, recipe.checkpoint.dir or recipe.run.dir
        shards = local_folder(data.shards) if data.reader == "indexed" else None
        why = "" if shards else "a stream" if data.reader == "stream" else "remote"
        at_a_time = _READY * data.num_workers + _HELD if data.num_workers else 0
        return cls(
            shards=shards,
            unchecked=f"data.shards on the hosts, since {without_secrets(data.shards)} is {why}" if why else "",
            folders=tuple(
                sorted({place for folder in (recipe.run.dir, checkpoints) if (place := local_folder(folder))})
            ),
            checkpoints=local_folder(checkpoints),
            checkpoint_bytes=checkpoint_bytes,
            num_checkpoints=saved.keep_last + 1 + (saved.keep_best and data.val_shards is not None),
            loader_processes=data.num_workers * processes,
            loader_bytes=at_a_time * batch_bytes * processes,
        )


def local_folder(path: str) -> str | None:
    """`path` unless it is a URL."""
    return None if "://" in path else path
