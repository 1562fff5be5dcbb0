"""One thing that was looked at, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check says.

    Attributes:
        level: error: a training here fails or is wrong; warning: it is slow, or may fail; ok: nothing to do.
        check: what was looked at, in a word or two, as "torchvision".
        found: what was found, in one line.
        fix: what to do about it, where it can be a command; empty where there is nothing to do.
        host: where, if several machines were looked at.
        facts: the figures in it, for scripts.
    """

    level: Level
    check: str
    found: str
    fix: str = ""
    host: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(filter(None, [f"{self.host}: {self.found}" if self.host else self.found, self.fix]))


def first_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {what}{'s' * (number != 1)}"


def sized(number: float) -> str:
    """`number` bytes in GB or MB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def worst(findings: Iterable[Finding]) -> Level:
    """The gravest level among them."""
    levels: tuple[Level, ...] = ("error", "warning", "ok")
    return min((finding.level for finding in findings), key=levels.index, default="ok")
