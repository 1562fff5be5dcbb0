"""When what happens in a run: durations in steps, and stages of other batch and image sizes, against counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler.collectives import World
from scaler.methods.base import Method
from scaler.recipe import Recipe, load_recipe
from scaler.timetable import Timetable, batch_sizes

SAMPLES = 1009
METHOD = Method(None, image_size=1, world=World())  # without scheduled values of its own


def recipe(*overrides: str, stages: object = "[]", total: str = "1000 steps") -> Recipe:
    fixed = ["data.shards=x", "data.global_batch_size=64", f"data.stages={stages}", f"schedule.total={total}"]
    return load_recipe("simclr/demo", overrides=[*fixed, *overrides])


def timetable(*overrides: str, **options: object) -> Timetable:
    return Timetable(recipe(*overrides, **options), num_samples=SAMPLES)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7),
        ("1 step", 1),
        ("2 epochs", 32),  # 2 · 1009 / 64 = 31.53…, and the last step belongs to them
        ("0.5 epochs", 8),
        ("640 images", 10),
        ("641 images", 11),
        ("1e3 images", 16),
        ("0 epochs", 0),
    ],
)
def test_durations_in_steps(text, steps):
    assert timetable().steps(text) == steps


@st.composite
def staged(draw) -> list[dict[str, object]]:
    found, steps = [], 0
    for _ in range(draw(st.integers(1, 4))):
        steps += draw(st.integers(1, 12))
        found.append({"until": f"{steps} steps", "global_batch_size": draw(st.sampled_from([8, 16, 48, 100]))})
    return found


@settings(max_examples=60, deadline=None)
@given(staged(), st.integers(1, 4000), st.integers(1, 500))
def test_stages_are_what_counting_step_by_step_gives(stages, length, every):
    table = timetable(stages=stages)
    images, step, due = 0, 0, []
    while step < 80:
        size = next((s["global_batch_size"] for s in stages if step < int(s["until"].split()[0])), 64)
        assert table.stage(step).global_batch_size == size
        assert table.images(step) == images
        if images < length <= images + size:
            assert table.steps(f"{length} images") == step + 1
        images, step = images + size, step + 1
        due += [step] if images // every > (images - size) // every else []
    assert [s for s in range(1, 81) if table.due(f"{every} images", s)] == due
    assert [s for s in range(1, 81) if table.due("7 steps", s)] == list(range(7, 81, 7))
    assert not any(table.due(f"0 {unit}", s) for unit in ("steps", "images") for s in range(1, 81))


def test_stages_in_epochs_and_images():
    table = timetable(stages="[{until: 1 epochs, image_size: 16}, {until: 2100 images, global_batch_size: 128}]")
    first, second, last = table.stages
    assert (first.stop, first.image_size, first.global_batch_size) == (16, 16, 64)  # 16 · 64 ≥ 1009
    assert (second.start, second.first_image, second.stop) == (16, 1024, 25)  # 1024 + 9 · 128 ≥ 2100
    assert (last.start, last.first_image, last.image_size, last.stop) == (25, 2176, 32, None)
    assert "128 images of 32 px from step 17 on" in (table.describe() or "")
    assert timetable().describe() is None
    assert batch_sizes(table.recipe) == [128, 64]


def test_the_learning_rate_follows_the_batch_size_of_the_step():
    ramp = "[{until: 50 steps, global_batch_size: 64}]"
    lr = ("optim.lr=1e-3", "optim.lr_rule=sqrt_1024", "schedule.warmup=10 steps")
    table = timetable("data.global_batch_size=256", *lr, stages=ramp)
    assert table.hyper(METHOD, 9)["lr"] == pytest.approx(1e-3 * (64 / 1024) ** 0.5)
    before, after = table.hyper(METHOD, 49)["lr"], table.hyper(METHOD, 50)["lr"]
    assert after / before == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{until: 9 steps, image_size: 8}, {until: 9 steps, image_size: 16}]", "stage 2 is until 9 steps"),
        ("[{until: 1000 steps, global_batch_size: 8}]", "never reached"),
        ("[{until: 0 steps, global_batch_size: 8}]", "stage 1 is until 0 steps"),
        ("[{until: 10 steps}]", "needs a global_batch_size or an image_size"),
        ("[{until: 10 steps, global_batch: 8}]", "did you mean 'global_batch_size'"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        timetable(stages=stages)


def test_a_run_ends_at_stop_after_or_its_total():
    assert timetable("run.stop_after=5 epochs").stop == 79
    assert timetable("run.stop_after=5000 steps").stop == 1000


def test_the_shapes_of_the_learning_rate():
    """Step against torch's scheduler, in epochs, on top of the warm-up; constant keeps the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    table = timetable("schedule.warmup=10 steps", "schedule.shape=step", "schedule.milestones=[2 epochs, 40 steps]",
                      "schedule.factor=0.3", "optim.lr=0.1", total="60 steps")  # fmt: skip
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[32, 40], gamma=0.3)
    constant = timetable("schedule.warmup=10 steps", "schedule.shape=constant", "optim.lr=0.1", total="60 steps")
    for step in range(60):
        if step >= 10:
            assert table.hyper(METHOD, step)["lr"] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
            assert constant.hyper(METHOD, step)["lr"] == 0.1
        else:
            assert constant.hyper(METHOD, step)["lr"] == table.hyper(METHOD, step)["lr"] == pytest.approx(step / 90)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.shape=step"], "shape step needs milestones"),
        (["schedule.milestones=[5 steps]"], "milestones is read by shape step and has no effect with cosine"),
        (["schedule.shape=constant", "schedule.final_lr=1e-3"], "final_lr is read by shape cosine and has no effect"),
        (["schedule.shape=step", "schedule.milestones=[30 steps, 1 epochs]"], r"at steps 30, 16: each must be later"),
        (["schedule.shape=step", "schedule.milestones=[20 steps]"], r"after the warm-up \(step 20\)"),
        (["schedule.shape=step", "schedule.milestones=[60 steps]"], r"the last before the end \(step 60\)"),
    ],
)
def test_milestones_that_change_nothing_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        timetable(*overrides, "schedule.warmup=20 steps", total="60 steps")
