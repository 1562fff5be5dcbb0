"""A recipe: whether it is right, and what a run of it takes of a machine, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from scaler.doctor.finding import Finding, first_line, sized

if TYPE_CHECKING:
    from scaler.doctor.needs import Needs
    from scaler.methods.base import Method
    from scaler.recipe import Recipe


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """The recipe's `Needs` as the facts of a finding, with the `views` that its loader cuts.

    Args:
        asked: `recipe` and `overrides` as on a command line, `processes` of a machine, `ranks` of all machines.
    """
    try:
        from scaler.recipe import load_recipe

        recipe = load_recipe(asked["recipe"], overrides=asked["overrides"])
    except ValueError as error:
        for line in str(error).splitlines():
            yield Finding("error", "recipe", line)
        return
    except (ImportError, OSError, RuntimeError) as error:  # torch, or what does not fit it
        yield Finding("error", "recipe", f"not looked at: {first_line(error)}", "mend the installation first")
        return
    if recipe.strategy.name.startswith("zero") and find_spec("deepspeed") is None:
        found = f"strategy.name={recipe.strategy.name} needs DeepSpeed, which is not installed"
        yield Finding("error", "deepspeed", found, "pip install 'scaler[deepspeed]'")
    try:
        facts = _facts(recipe, processes=asked["processes"], ranks=asked["ranks"])
    except ValueError as error:
        yield Finding("error", "recipe", first_line(error))
        return
    found = (
        f"{asked['recipe']}: {facts['parameters'] / 1e6:.3g} M trained parameters, a checkpoint takes "
        f"{sized(facts['checkpoint_bytes'])}; batches of {recipe.data.global_batch_size} lie on {asked['ranks']} "
        f"process{'es' * (asked['ranks'] > 1)}"
    )
    yield Finding("ok", "recipe", found, facts=facts)


def _facts(recipe: Any, *, processes: int, ranks: int) -> dict[str, Any]:
    """The needs of a run, and what else other checks are asked by.

    Raises:
        ValueError: its batches cannot be laid over so many ranks.
    """
    from scaler.layout import batch_layout
    from scaler.timetable import batch_sizes

    if recipe.strategy.min_ranks is None:
        for size in batch_sizes(recipe):
            batch_layout(size, micro_batch_size=recipe.strategy.micro_batch_size, ranks=ranks)
    needs, method = measure(recipe, processes=processes, ranks=ranks)
    return {
        **asdict(needs),
        "parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "views": [asdict(view) for view in method.views_at(recipe.data.image_size)],
        "data": None if recipe.data.reader == "stream" else recipe.data.shards,
        "cache_dir": recipe.data.cache_dir,
        "decode": recipe.data.decode,
    }


def measure(recipe: Recipe, *, processes: int, ranks: int) -> tuple[Needs, Method]:
    """What a run takes of each machine, and its method, built on the meta device: nothing is allocated.

    Args:
        recipe: the recipe.
        processes: that train on a machine.
        ranks: on all machines.
    """
    import torch

    from scaler.collectives import World
    from scaler.doctor.needs import Needs
    from scaler.methods import method_class
    from scaler.optimizers import build_optimizer
    from scaler.strategies.base import create_state

    with torch.device("meta"):
        method = method_class(recipe.method.name)(recipe.method, image_size=recipe.data.image_size, world=World())
        optimizer = build_optimizer(recipe.optim, method.parameter_groups(recipe.optim))
        create_state(optimizer)
    states = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    data, micro = recipe.data, recipe.strategy.micro_batch_size
    stages = [(data.global_batch_size, data.image_size)]
    stages += [(s.global_batch_size or data.global_batch_size, s.image_size or data.image_size) for s in data.stages]
    pixels = {size: sum(view.count * 3 * view.size**2 for view in method.views_at(size)) for _, size in stages}
    needs = Needs.of(
        recipe,
        checkpoint_bytes=sum(tensor.nbytes for tensor in [*method.state_dict().values(), *states]),
        batch_bytes=max((micro or -(-batch // ranks)) * pixels[size] for batch, size in stages),
        processes=processes,
    )
    return needs, method
