"""What a recipe's parameters are, without their values: sizes, optimiser groups, and the units that FSDP2 gathers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from scaler.methods.base import Method
from scaler.optimizers import build_optimizer
from scaler.recipe import Recipe

ROOT = -1  # the unit of everything that is in no block

# Values that an optimiser keeps for each value it trains, by its name in the recipe.
_STATES = {"adamw": 2, "sgd": 1, "lars": 1}


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, the optimiser group that trains it (None: nothing does), and its unit, the place in
    `Method.blocks` or ROOT."""

    shape: tuple[int, ...]
    group: int | None
    unit: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def rows(self, ranks: int) -> int:
        """Elements on the rank that holds most of it, where dimension 0 is cut as by FSDP2."""
        return -(-self.shape[0] // ranks) * (self.numel // self.shape[0]) if self.shape else 1

    def part(self, ranks: int) -> int:
        """Elements on the rank that holds most of it, flattened and cut as by ZeRO-3."""
        return -(-self.numel // ranks)


@dataclass(frozen=True)
class Model:
    """All parameters by name, elements of the buffers, and the optimiser's name."""

    weights: dict[str, Weight]
    buffer_bytes: int
    optimizer: str
    weight_decay: bool

    @classmethod
    def of(cls, method: Method, recipe: Recipe) -> Model:
        """The recipe's method, which may be on the meta device."""
        optimizer = build_optimizer(recipe.optim, method.parameter_groups(recipe.optim))
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        units = {id(p): i for i, block in enumerate(method.blocks()) for p in block.parameters()}
        weights = {
            name: Weight(tuple(p.shape), groups.get(id(p)), units.get(id(p), ROOT))
            for name, p in method.named_parameters()
        }
        buffers = sum(b.numel() * b.itemsize for b in method.buffers())
        return cls(weights, buffers, recipe.optim.name, bool(recipe.optim.weight_decay))

    @cached_property
    def trained(self) -> list[Weight]:
        """What the optimiser trains."""
        return [w for w in self.weights.values() if w.group is not None]

    @cached_property
    def frozen(self) -> list[Weight]:
        """What it does not: teachers, averages, fixed embeddings."""
        return [w for w in self.weights.values() if w.group is None]

    @cached_property
    def groups(self) -> list[list[Weight]]:
        """The trained parameters of each optimiser group."""
        found: dict[int, list[Weight]] = defaultdict(list)
        for weight in self.trained:
            assert weight.group is not None
            found[weight.group].append(weight)
        return list(found.values())

    @cached_property
    def units(self) -> dict[int, int]:
        """Elements of each unit."""
        found: dict[int, int] = defaultdict(int)
        for weight in self.weights.values():
            found[weight.unit] += weight.numel
        return found

    @staticmethod
    def count(weights: Iterable[Weight]) -> int:
        """Elements of weights."""
        return sum(w.numel for w in weights)

    def count_of(self, names: Iterable[str]) -> int:
        """Elements of the parameters of these names."""
        return self.count(self.weights[name] for name in names)

    @property
    def states(self) -> int:
        """Values that the optimiser keeps for each one it trains."""
        return _STATES[self.optimizer]
