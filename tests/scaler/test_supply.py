"""What workers deliver, how many are needed, and when decoding on the GPU pays: against counting and simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.supply import HEADROOM, delivered, fed, gpu_decoding_pays, worker_room, workers_needed

RATES = st.floats(1.0, 1e5)
CURVES = st.dictionaries(st.integers(1, 32), RATES, min_size=1, max_size=6)


def test_rates_by_hand() -> None:
    curve = {1: 400.0, 2: 700.0, 4: 1300.0}
    assert [delivered(n, curve) for n in (0, 1, 2, 3, 4, 8)] == [400, 400, 700, 1000, 1300, 2600]
    assert delivered(3, {2: 700.0}) == 1050
    assert [workers_needed(w, curve, headroom=1.0) for w in (0.0, 1, 400, 401, 1000, 1001, 1300, 1301)] == [
        1, 1, 1, 2, 3, 4, 4, 5,
    ]  # fmt: skip
    assert workers_needed(400.0, {1: 400.0}) == 2, "some headroom"
    assert [worker_room(c, processes=p) for c, p in ((1, 1), (2, 1), (4, 1), (16, 2), (16, 32))] == [1, 1, 3, 7, 1]


@given(RATES, CURVES)
def test_the_smallest_number_that_suffices(wanted: float, curve: dict[int, float]) -> None:
    number = workers_needed(wanted, curve)
    target = HEADROOM * wanted * (1 - 1e-9)
    assert number >= 1 and delivered(number, curve) >= target
    rates = [0.0, *(rate for _, rate in sorted(curve.items()))]
    if rates == sorted(rates):  # else fewer may have been measured to be faster
        assert number == 1 or delivered(number - 1, curve) < HEADROOM * wanted * (1 + 1e-9)


def trained(wanted: float, *, by_workers: float, device_seconds: float) -> float:
    """Images/s of a pipeline, simulated image by image: workers make one after the other, the step takes it when it is
    there, and the device decodes it before it trains on it."""
    made = free = 0.0
    for _ in range(200):
        made += 1 / by_workers
        free = max(made, free) + device_seconds + 1 / wanted
    return 200 / free


@pytest.mark.parametrize("wanted", [300.0, 1000.0])
@pytest.mark.parametrize("by_cpu", [150.0, 500.0, 2000.0])
@pytest.mark.parametrize("by_gpu", [400.0, 4000.0])
@pytest.mark.parametrize("device_seconds", [0.0, 1e-4, 4e-3])
def test_gpu_decoding_pays_when_the_pipeline_is_faster(
    wanted: float, by_cpu: float, by_gpu: float, device_seconds: float
) -> None:
    cpu = trained(wanted, by_workers=by_cpu, device_seconds=0.0)
    gpu = trained(wanted, by_workers=by_gpu, device_seconds=device_seconds)
    assert cpu == pytest.approx(fed(wanted, by_workers=by_cpu), rel=0.02)
    assert gpu == pytest.approx(fed(wanted, by_workers=by_gpu, device_seconds=device_seconds), rel=0.02)
    pays = gpu_decoding_pays(wanted, by_cpu=by_cpu, by_gpu=by_gpu, device_seconds=device_seconds)
    assert pays == (gpu > 1.02 * cpu)


def test_a_step_that_is_fed_needs_no_gpu_decoding() -> None:
    assert not gpu_decoding_pays(500.0, by_cpu=500.0, by_gpu=1e6, device_seconds=0.0)
    assert gpu_decoding_pays(500.0, by_cpu=499.0, by_gpu=1e6, device_seconds=0.0)
