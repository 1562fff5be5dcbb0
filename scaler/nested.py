"""Nested settings as plain data: flattened, and fit to be shown to others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without_credentials(value: Any) -> Any:
    """A copy of nested settings in which URLs have lost their user, password and query (where signatures sit)."""
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return re.sub(r"(\w+://)(?:[^/@\s]*@)?([^?\s]*)(\?\S*)?", r"\1\2", value)
    return value
