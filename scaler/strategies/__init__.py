"""The strategies by name; a new one is a file here and a line below."""

from scaler.strategies.base import Piece, StepResult, Strategy
from scaler.strategies.ddp import DDP
from scaler.strategies.fsdp2 import FSDP2

STRATEGIES: dict[str, type[Strategy]] = {"ddp": DDP, "fsdp2": FSDP2}

__all__ = ["STRATEGIES", "Piece", "StepResult", "Strategy"]
