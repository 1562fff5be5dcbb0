"""Settings that were set and that nothing reads, because of another setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel


def unread(settings: BaseModel, reasons: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A warning for each reason that leaves some settings without effect and finds them changed from their defaults.

    Args:
        settings: of a method.
        reasons: why, in words; and the names of the settings.
    """
    fields = type(settings).model_fields
    for reason, names in reasons.items():
        if changed := [f"method.{name}" for name in names if getattr(settings, name) != fields[name].default]:
            yield f"warning: {' and '.join(changed)} set, without effect: {reason}"
