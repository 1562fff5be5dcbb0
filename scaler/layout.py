"""How the global batch is laid over processes: micro-batch × accumulation × ranks, multiplied out exactly.

Normally all processes that were started train. With `strategy.min_ranks` a run that lost machines goes on with those
that are left: on the largest number of ranks over which the same global batch can be laid; the others idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shards.loader import accumulation_steps


@dataclass(frozen=True)
class Layout:
    """Ranks that train, images of one forward on one rank, and micro-batches of each rank."""

    ranks: int
    micro_batch_size: int
    num_micro_batches: int


def batch_layout(global_batch_size: int, *, micro_batch_size: int | None, ranks: int) -> Layout:
    """The layout over exactly so many ranks; without a micro-batch size there is one micro-batch a rank.

    Raises:
        ValueError: it does not multiply out; names the nearest values that do.
    """
    micro = micro_batch_size or max(1, global_batch_size // ranks)
    return Layout(ranks, micro, accumulation_steps(global_batch_size, micro_batch_size=micro, world_size=ranks))


def elastic_layouts(
    batch_sizes: Sequence[int],
    *,
    micro_batch_size: int | None,
    started: int,
    min_ranks: int,
    check: Callable[[Layout], None],
) -> dict[int, Layout]:
    """Layouts of all batch sizes over the most of the `started` processes that can share each, `min_ranks` at least.

    The recipe's micro-batch is kept where it divides what a rank gets, else the next smaller one is taken, which fits
    into memory as well.

    Args:
        check: raises `ValueError` for a layout on which the method or the strategy cannot work.

    Raises:
        ValueError: too few processes, or no such layout; names the reason met last.
    """
    if started < min_ranks:
        raise ValueError(
            f"{started} processes were started and strategy.min_ranks is {min_ranks}; start more, or lower it"
        )
    reason = ""
    for ranks in range(started, min_ranks - 1, -1):
        try:
            return {size: _layout_over(ranks, size, micro_batch_size, check) for size in batch_sizes}
        except ValueError as error:
            reason = str(error) if str(error) or not reason else reason
    sizes = " or ".join(map(str, batch_sizes))
    raise ValueError(
        f"a global batch of {sizes} cannot be laid over {min_ranks} to {started} ranks "
        f"(strategy.min_ranks to those that were started): {reason or 'it divides by none of these'}"
    )


def _layout_over(ranks: int, size: int, micro_batch_size: int | None, check: Callable[[Layout], None]) -> Layout:
    """The layout with the largest micro-batch that `check` accepts; `ValueError` with its last objection, if any."""
    share, remainder = divmod(size, ranks)
    reason = ""
    if not remainder and share:
        largest = min(share, micro_batch_size or share)
        for micro in (m for m in range(largest, 0, -1) if share % m == 0):
            layout = Layout(ranks, micro, share // micro)
            try:
                check(layout)
            except ValueError as error:
                reason = str(error)
            else:
                return layout
    raise ValueError(reason)
