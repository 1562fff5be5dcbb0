"""Garbage collection passes over what was there when training began, and over nothing afterwards."""

from __future__ import annotations

import gc
import weakref

from scaler.pauses import short_pauses


class Ring:
    """Refers to itself, so that only the garbage collector finds it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_long_lived_is_not_looked_at_and_new_garbage_is_still_collected() -> None:
    assert gc.get_freeze_count() == 0
    with short_pauses() as settle:
        assert gc.get_freeze_count() == 0, "nothing before all is there"
        settle()
        frozen = gc.get_freeze_count()
        assert frozen > 10_000, "all modules that are imported"
        assert len(gc.get_objects()) < frozen / 10
        lost = weakref.ref(Ring())
        gc.collect()
        assert lost() is None
    assert gc.get_freeze_count() == 0
