"""Which reference there is of a method, and why a recipe may have none."""

from __future__ import annotations

from scaler.bench.references.base import Reference
from scaler.bench.references.dinov2 import DINOv2Reference
from scaler.bench.references.simclr import SimCLRReference
from scaler.bench.references.supervised import SupervisedReference
from scaler.recipe import Recipe

REFERENCES: dict[str, type[Reference]] = {
    "dinov2": DINOv2Reference,
    "simclr": SimCLRReference,
    "supervised": SupervisedReference,
}


def why_no_reference(recipe: Recipe, *, ranks: int, num_micro_batches: int, precision: str) -> str | None:
    """What of a recipe the reference has not been written for; None: it can run."""
    kind = REFERENCES.get(recipe.method.name)
    if kind is None:
        return f"there is none of {recipe.method.name}"
    reasons = {
        **kind.refused(recipe),
        f"with optim.name={recipe.optim.name}": recipe.optim.name not in kind.optimizers,
        f"in {precision}": precision == "fp16",
        f"on {ranks} ranks": ranks > 1,
        "with accumulation": num_micro_batches > 1,
    }
    without = [reason for reason, applies in reasons.items() if applies]
    return f"it does not run {' or '.join(without)}" if without else None
