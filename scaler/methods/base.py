"""What the loop and the strategies know of a method.

A method is one module that holds the student, its heads and, where there is one, the teacher. A global-batch loss over
micro-batches takes two passes, one shape for every method: *observe* each micro-batch without gradient, *combine* the
observations of all micro-batches and ranks into one target per micro-batch, *learn* from each micro-batch with its
target. All go through `forward`, the only compute entry, because that is what DDP and FSDP2 hook.

A method never calls backward, never moves devices, and never asks which strategy runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from scaler.collectives import World
from shards.decode import View

if TYPE_CHECKING:
    from scaler.nn.base import Backbone
    from scaler.nn.color import Color
    from scaler.nn.weights import Weights  # at run time it would cost every command the import of timm

Stage = Literal["observe", "combine", "learn", "evaluate", "features"]
Batch = dict[str, Any]
Hyper = dict[str, float]
Channels = tuple[float, float, float]
Lerp = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]
ReadWeights = Callable[..., "Weights"]  # scaler.weights.read_weights(source, backbone=…)


@dataclass(frozen=True)
class Shown:
    """One copy of a view of m images as the network gets it, for people to look at.

    Attributes:
        view, copy: which of the loader's views, and which of its copies.
        images: normalised float32 [m, 3, h, w], or uint8 where the network normalises them.
        color: what its colours were drawn from, by `sample_color`.
        masks: bool [m, h', w'], the patches that the student does not see; None: it sees all.
        notes: a line of its own for each image, [m], or none at all.
    """

    view: str
    copy: int
    images: Tensor
    color: Color
    masks: Tensor | None = None
    notes: Sequence[str] = ()


class Method(nn.Module):
    """Base class of simclr, dinov2, supervised, …

    Attributes a subclass sets:
        Settings: pydantic model (extra="forbid") of the recipe's `method:` section, `name` included.
        validates: whether `evaluate` scores labelled images; of other methods, features are evaluated (kNN).
        world: collectives for global-batch quantities.
        normalization: mean and standard deviation per channel of the images it is given (pixels from 0 to 1);
            ImageNet's unless it says otherwise.
        image_dtype: what `augment` gives images in; a strategy sets it to its precision, to which autocast would round
            them at the first layer anyway.
    """

    Settings: ClassVar[type[BaseModel]]
    validates: ClassVar[bool] = False
    world: World
    image_dtype: torch.dtype = torch.float32
    normalization: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def __init__(self, settings: Any, *, image_size: int, world: World) -> None:
        super().__init__()
        self.settings, self.image_size, self.world = settings, image_size, world

    def views_at(self, image_size: int) -> tuple[View, ...]:
        """What the loader's workers cut from every image (geometry only, uint8) at this size of a (global) crop.

        Raises:
            ValueError: a size on which the backbone does not run.
        """
        raise NotImplementedError

    @property
    def views(self) -> tuple[View, ...]:
        """The views at the recipe's image size."""
        return self.views_at(self.image_size)

    def load_weights(self, read: ReadWeights) -> list[str]:
        """Start from the weights that the settings name, if they name any, instead of from random ones.

        Called when a run starts from nothing (a resumed one has its checkpoint), before a strategy wraps the module.

        Args:
            read: opens a source (`scaler.weights.read_weights`), which methods themselves know nothing of.

        Returns:
            What was loaded and what was not, a line each for the user.

        Raises:
            ValueError: a source that cannot be read, or weights of another architecture; says what to set.
        """
        return []

    def check_layout(self, *, num_micro_batches: int, micro_batch_size: int) -> None:
        """Refuse a layout that cannot give the global batch's loss.

        Raises:
            ValueError: states the rule and the way out.
        """

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Refuse shards whose classes (none: no labels) are not what the method trains on.

        Raises:
            ValueError: states the rule and the way out.
        """

    def augment(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """The device half of the augmentation: loader batch (uint8 views) → what `forward` takes (floats, masks).

        `batch` is on the training device: `views` {name: uint8 [count, m, 3, size, size]}, `ids`, `epochs`,
        `positions` and `labels` int64 [m] (position inside the global batch; all three on the CPU), and
        `global_batch_size` int. Every random parameter is keyed by (seed, epoch, id, view) or (seed, step, …).
        """
        raise NotImplementedError

    def shown(self, batch: Batch, augmented: Batch) -> list[Shown]:
        """What `augment` made of a loader batch, in the order of `views` and their copies."""
        raise NotImplementedError

    def observes(self, num_micro_batches: int) -> bool:
        """Whether the observe and combine passes are needed for this many local micro-batches."""
        raise NotImplementedError

    def forward(self, stage: Stage, *args: Any) -> Any:
        """`observe(batch, hyper)`, `combine(observations, hyper)`, `learn(batch, target, hyper)`, `evaluate(…)` or
        `features(images)`.
        """
        return getattr(self, stage)(*args)

    def observe(self, batch: Batch, hyper: Hyper) -> Any:
        """What this micro-batch contributes to the global targets; called without gradient."""
        raise NotImplementedError

    def combine(self, observations: list[Any], hyper: Hyper) -> list[Any]:
        """One target per local micro-batch from the observations of all micro-batches and ranks."""
        raise NotImplementedError

    def learn(self, batch: Batch, target: Any, hyper: Hyper) -> dict[str, Any]:
        """Loss of this micro-batch.

        Returns `loss`, the scalar to differentiate, whose mean over micro-batches and ranks has the gradient of the
        global loss, and `metrics`, detached scalars (`loss`, `loss/NAME`, …) whose mean is what is logged.
        """
        raise NotImplementedError

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scores of each of n held-out images by name, float [n] (`top1`, `loss`, …), called in evaluation mode and
        without gradient; the caller leaves padding out and takes the mean.

        Args:
            images: normalised, float32 [n, 3, h, w].
            labels: int64 [n].
        """
        raise NotImplementedError

    def advice(
        self, *, num_samples: int | None, global_batch_size: int, steps: Callable[[str], int], optim: Any
    ) -> list[str]:
        """What the user should know of this method on so many images, a line each; what is likely to fail starts with
        "warning: ".

        Args:
            num_samples: images in the training data; None: nobody knows.
            global_batch_size: images of a step.
            steps: turns a duration (or "total") into steps, as for `hyper`.
            optim: the recipe's optimiser section.
        """
        return []

    def symptoms(self, row: Mapping[str, float]) -> dict[str, str]:
        """Signs that training has collapsed or stands still in one logged row (the keys of metrics.jsonl): a short name
        for each, with a sentence on what it means and what to change. A sign that stays is told to the user.
        """
        return {}

    def hyper(self, step: int, steps: Callable[[str], int]) -> Hyper:
        """The method's own scheduled values (momentum, temperatures, …) at `step`, counted from 0.

        `steps` turns a duration ("N steps", "N epochs", "N images", or "total") into steps.
        """
        return {}

    def parameter_groups(self, optim: Any) -> list[dict[str, Any]]:
        """Optimiser groups: `params`, `names`, `lr_scale`, `weight_decay_scale`, `clip` (module name for clipping),
        and optionally `lr_key` (which entry of the hyper values is its learning rate; default "lr").

        Called after the strategy has wrapped the module, since FSDP2 replaces the parameters.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Units to shard, checkpoint and compile."""
        raise NotImplementedError

    def stems(self) -> list[nn.Module]:
        """Further units to compile, which are neither sharded nor checkpointed by themselves."""
        return []

    def compile_loss(self) -> None:
        """Compile what gains by it outside of `blocks`, when it is first called; asked for by strategy.compile."""

    @torch.no_grad()
    def after_step(self, hyper: Hyper, lerp_: Lerp) -> None:
        """Called after every optimiser step; `lerp_(targets, sources, weight)` works on local shards."""

    def evaluated_backbone(self) -> Backbone:
        """The backbone that is evaluated: the teacher's or the averaged one where there is such a thing."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Evaluation features, float [n, dim], of normalised images, float [n, 3, h, w]."""
        return self.evaluated_backbone().pooled(images)
