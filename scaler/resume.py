"""Whether a checkpoint may be continued by this recipe on these data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scaler.checkpoint import Location
from scaler.nested import flatten
from scaler.recipe import parse_recipe

# What may change between a run and its continuation without changing its results (layout, logging, places), or with an
# effect that the user asks for by changing it.
_FREE = (
    "strategy.",
    "checkpoint.",
    "track.",
    "evaluate.",
    "run.dir",
    "run.stop_after",
    "run.deterministic",
    "run.max_nonfinite",
    "run.max_rewinds",
    "run.timeout_minutes",
    "method.weights",  # what the run began with: its checkpoints hold what has become of them
    "data.shards",
    "data.val_shards",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.allow_pipes",
    "data.cache_dir",
    "data.cache_size",
)


def check_continues(
    manifest: dict[str, Any], *, recipe: dict[str, Any], fingerprint: str, allowed: Sequence[str], path: Location
) -> None:
    """Refuse to continue a checkpoint with other data or another recipe, unless allowed by name.

    Raises:
        ValueError: names what differs, the consequence and the override.
    """
    if manifest["fingerprint"] != fingerprint and "data" not in allowed:
        raise ValueError(
            f"{path} was trained on other data (fingerprint {manifest['fingerprint'][:12]}, now "
            f"{fingerprint[:12]}): the order of images would change; restore the shards, start a new "
            "run.dir, or set checkpoint.allow_changes=[data]"
        )
    before, now = dict(flatten(_with_defaults(manifest["recipe"]))), dict(flatten(recipe))
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    changed = [k for k in changed if not k.startswith(_FREE) and k not in allowed]
    if changed:
        details = ", ".join(f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in changed)
        raise ValueError(
            f"{path} was trained with another recipe ({details}): results would no longer be those of one "
            f"run; undo the change, start a new run.dir, or set "
            f"checkpoint.allow_changes=[{','.join(changed)}]"
        )


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's recipe with the options that are newer than it, which all do nothing by default."""
    try:
        return parse_recipe(recipe, source="checkpoint").model_dump(mode="json")
    except ValueError:  # of a newer version: the comparison names what is unknown here
        return recipe
