"""Schedules against numpy's linspace and a table worked out by hand for DINOv2's ViT-L recipe."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightly.utils.scheduler import cosine_schedule

from scaler.schedules import Duration, cosine, linear, warmup_cosine, warmup_momentum, warmup_steps


@pytest.mark.parametrize(
    "text", ["", "10", "ten steps", "10 parsecs", "-3 steps", "10 steps 2 epochs", None, 10, "steps"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is no duration"):
        Duration.parse(text)


def test_durations_print_as_they_are_written():
    assert str(Duration.parse(" 100  steps ")) == "100 steps"
    assert str(Duration.parse("2.5 epochs")) == "2.5 epochs"
    assert Duration.parse(str(Duration.parse("1e6 images"))) == Duration(1e6, "images")


@given(length=st.integers(2, 50), start=st.floats(-5, 5), end=st.floats(-5, 5))
def test_linear_is_linspace(length, start, end):
    got = [linear(step, length=length, start=start, end=end) for step in range(length)]
    np.testing.assert_allclose(got, np.linspace(start, end, length), rtol=1e-12, atol=1e-12)
    assert linear(length + 3, length=length, start=start, end=end) == end


@given(total=st.integers(2, 60), warmup=st.integers(0, 20))
def test_warmup_cosine_against_numpy(total, warmup):
    warmup = min(warmup, total - 1)
    rest = np.arange(total - warmup)
    expected = np.concatenate(
        [np.linspace(0, 3.0, warmup), 0.1 + 0.5 * (3.0 - 0.1) * (1 + np.cos(np.pi * rest / len(rest)))]
    )
    got = [warmup_cosine(step, total=total, warmup=warmup, peak=3.0, end=0.1) for step in range(total)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@given(
    warmup=st.integers(0, 12),
    milestones=st.lists(st.integers(0, 60), max_size=5, unique=True).map(sorted),
    factor=st.floats(0.05, 0.95),
)
def test_steps_against_numpy(warmup, milestones, factor):
    steps = np.arange(60)
    expected = 3.0 * factor ** (np.array(milestones)[:, None] <= steps).sum(axis=0)
    expected[:warmup] = np.linspace(0, 3.0, warmup)
    got = [warmup_steps(step, warmup=warmup, peak=3.0, milestones=milestones, factor=factor) for step in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_the_momentum_of_an_average_warms_up():
    got = [warmup_momentum(step, momentum=0.9) for step in (0, 1, 8, 79, 80, 81, 10**6)]
    assert got == pytest.approx([0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9, 0.9])


@given(total=st.integers(1, 10**6), share=st.floats(0, 1), start=st.floats(-5, 5), end=st.floats(-5, 5))
def test_cosine_is_lightlys(total, share, start, end):
    step = round(share * total)
    got = cosine(step, total=total, start=start, end=end)
    assert got == pytest.approx(cosine_schedule(step, total + 1, start, end), rel=1e-10, abs=1e-12)


def test_vitl_table_by_hand():
    """ViT-L/16 short recipe: 125,000 steps of 2,048 images, 12,500 of warm-up, peak 0.004·√2, floor 1e-6."""
    peak = 0.004 * math.sqrt(2048 / 1024)
    table = {
        0: 0.0,
        12_499: 0.00565685424949238,  # the last step of the warm-up has the peak
        12_500: 0.00565685424949238,  # and so has the first of the cosine
        40_625: 1e-6 + (0.00565685424949238 - 1e-6) * 0.8535533905932737,  # a quarter: (1 + cos 45°) / 2
        68_750: (0.00565685424949238 + 1e-6) / 2,  # half way
        125_000: 1e-6,
    }
    for step, value in table.items():
        got = warmup_cosine(step, total=125_000, warmup=12_500, peak=peak, end=1e-6)
        assert got == pytest.approx(value, rel=1e-12), step
    assert cosine(0, total=125_000, start=0.04, end=0.4) == pytest.approx(0.04, rel=1e-12)
    assert cosine(62_500, total=125_000, start=0.04, end=0.4) == pytest.approx(0.22)
    assert cosine(125_000, total=125_000, start=0.992, end=1.0) == 1.0
    assert linear(0, length=37_500, start=0.04, end=0.07) == 0.04
    assert linear(37_499, length=37_500, start=0.04, end=0.07) == 0.07
    assert linear(90_000, length=37_500, start=0.04, end=0.07) == 0.07
