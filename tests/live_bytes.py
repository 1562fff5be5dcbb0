"""Counts the bytes of the tensors that are alive while a piece of code runs, exactly and on any device."""

from scaler.plan.live import LiveBytes

__all__ = ["LiveBytes"]
