"""The strategies by name; a new one is a file here and a line below."""

from importlib import import_module

from scaler.strategies.base import Piece, StepResult, Strategy

# Import paths, since DeepSpeed is an extra that only ZeRO needs.
STRATEGIES = {
    "ddp": "scaler.strategies.ddp:DDP",
    "fsdp2": "scaler.strategies.fsdp2:FSDP2",
    "zero1": "scaler.strategies.zero:Zero1",
    "zero2": "scaler.strategies.zero:Zero2",
    "zero3": "scaler.strategies.zero:Zero3",
}


def strategy_class(name: str) -> type[Strategy]:
    """The strategy of that name.

    Raises:
        ValueError: it needs a package that is not installed.
    """
    module, _, attribute = STRATEGIES[name].partition(":")
    try:
        found: type[Strategy] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(f"strategy {name} needs DeepSpeed: pip install 'scaler[deepspeed]'") from None
    return found


__all__ = ["STRATEGIES", "Piece", "StepResult", "Strategy", "strategy_class"]
