"""When what happens in a run: arithmetic on its recipe and the number of images, nothing else.

    timetable = Timetable(recipe, num_samples=1_281_167)
    timetable.steps("10 epochs")              # after so many steps 10 epochs have been seen
    timetable.stage(step).global_batch_size   # of the step that follows `step` updates
    timetable.hyper(method, step)             # learning rate, weight decay, momentum, …

A run begins with the `data.stages` of its recipe, if it has any: stretches with another batch size (ramp-up) or image
size (progressive resolution) than the rest. Steps count from 0 here: `step` is the number of updates already made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from scaler import schedules
from scaler.methods.base import Hyper, Method
from scaler.recipe import Recipe
from scaler.schedules import Duration


@dataclass(frozen=True)
class Stage:
    """A stretch of the run, from its first step to the one before `stop` (None: to the end)."""

    start: int
    first_image: int
    global_batch_size: int
    image_size: int
    stop: int | None = None


class Timetable:
    """The steps of a run: how many there are, and what each is made of.

    Args:
        recipe: durations, batch and image sizes.
        num_samples: images of an epoch; None: nobody knows (a stream), and no duration is in epochs.

    Raises:
        ValueError: stages or milestones that do not follow one another.
    """

    def __init__(self, recipe: Recipe, *, num_samples: int | None) -> None:
        self.recipe, self.num_samples = recipe, num_samples
        self.stages = tuple(self._stages())
        self.total = self.steps(recipe.schedule.total)
        stop_after = recipe.run.stop_after
        self.stop = min(self.total, self.steps(stop_after)) if stop_after else self.total
        if len(self.stages) > 1 and self.stages[-1].start >= self.total:
            raise ValueError(
                f"data.stages end at step {self.stages[-1].start}, but the run at step {self.total} (schedule.total "
                f"{recipe.schedule.total}), so data.global_batch_size and data.image_size are never reached: shorten "
                "the stages, or lengthen the run"
            )
        self.milestones = tuple(self.steps(text) for text in recipe.schedule.milestones)
        marks = (min(self.steps(recipe.schedule.warmup), self.total - 1), *self.milestones, self.total)
        if self.milestones and any(a >= b for a, b in itertools.pairwise(marks)):
            raise ValueError(
                f"schedule.milestones {', '.join(recipe.schedule.milestones)} are at steps "
                f"{', '.join(map(str, self.milestones))}: each must be later than the one before it, the first after "
                f"the warm-up (step {marks[0]}) and the last before the end (step {self.total})"
            )

    def _stages(self) -> Iterator[Stage]:
        data = self.recipe.data
        start, image = 0, 0
        for number, stage in enumerate(data.stages, start=1):
            size = stage.global_batch_size or data.global_batch_size
            until = Duration.parse(stage.until)
            stop = start + _steps(
                until, done=start if until.unit == "steps" else image, size=size, epoch=self.num_samples
            )
            if stop <= start:
                raise ValueError(
                    f"data.stages: stage {number} is until {stage.until} of the whole run, but it begins at step "
                    f"{start} ({image} images); each stage ends later than the one before it"
                )
            yield Stage(start, image, size, stage.image_size or data.image_size, stop)
            start, image = stop, image + (stop - start) * size
        yield Stage(start, image, data.global_batch_size, data.image_size)

    def steps(self, text: str) -> int:
        """The number of steps, from the run's beginning, that hold a duration ("10 epochs", …, or "total")."""
        if text == "total":
            return self.total
        duration = Duration.parse(text)
        if duration.unit == "steps":
            return math.ceil(duration.amount)
        for stage in self.stages:
            more = _steps(duration, done=stage.first_image, size=stage.global_batch_size, epoch=self.num_samples)
            if stage.stop is None or stage.start + more <= stage.stop:
                return max(0, stage.start + more)
        raise AssertionError("the last stage has no end")

    def images(self, step: int) -> int:
        """Images seen after `step` updates."""
        stage = self.stage(step)
        return stage.first_image + (step - stage.start) * stage.global_batch_size

    def stage(self, step: int) -> Stage:
        """What the step that follows `step` updates is part of."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)

    def due(self, interval: str, step: int) -> bool:
        """Whether an interval ends with the update that makes `step` of them: "100 steps", or each time that so many
        images or epochs have been passed. One of length 0 never does.
        """
        duration = Duration.parse(interval)
        if not duration.amount:
            return False
        if duration.unit == "steps":
            return step % math.ceil(duration.amount) == 0
        length = duration.images(self.num_samples)
        return step > 0 and self.images(step) // length > self.images(step - 1) // length

    def hyper(self, method: Method, step: int) -> Hyper:
        """Learning rate, weight decay and the method's own scheduled values.

        The peak of the learning rate follows `optim.lr_rule` with the batch size of the step.
        """
        optim, schedule, total = self.recipe.optim, self.recipe.schedule, self.total
        warmup = min(self.steps(schedule.warmup), total)
        peak = optim.scaled_lr(self.stage(step).global_batch_size)
        decay_end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        decay = schedules.cosine(step, total=total, start=optim.weight_decay, end=decay_end)
        if schedule.shape == "cosine":
            lr = schedules.warmup_cosine(step, total=total, warmup=warmup, peak=peak, end=schedule.final_lr)
        else:
            lr = schedules.warmup_steps(
                step, warmup=warmup, peak=peak, milestones=self.milestones, factor=schedule.factor
            )
        hyper = {"lr": lr, "weight_decay": decay}
        for name, value in method.hyper(step, self.steps).items():
            if name.endswith("_lr_scale"):  # a learning rate of its own for some groups, as a multiple of the common
                hyper[name.removesuffix("_scale")] = hyper["lr"] * value
            else:
                hyper[name] = value
        return hyper

    def describe(self) -> str | None:
        """The stages in words; None where there is only one."""
        if len(self.stages) == 1:
            return None
        parts = [
            f"{stage.global_batch_size} images of {stage.image_size} px from step {stage.start + 1} on"
            for stage in self.stages
        ]
        return "stages: " + ", ".join(parts)


def batch_sizes(recipe: Recipe) -> list[int]:
    """The global batch sizes that a recipe uses, in the order of their stages."""
    sizes = [stage.global_batch_size for stage in recipe.data.stages if stage.global_batch_size]
    return list(dict.fromkeys(itertools.chain(sizes, [recipe.data.global_batch_size])))


def _steps(duration: Duration, *, done: int, size: int, epoch: int | None) -> int:
    """Further steps until the duration is over, of which so many steps or images are done."""
    if duration.unit == "steps":
        return math.ceil(duration.amount) - done
    return math.ceil(round((duration.images(epoch) - done) / size, 9))
