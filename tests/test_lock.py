"""The lock holds all that is needed, and nothing else: each package at a version that fits, with its files' sha256."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lock import LOCK, PARTS, Pin, environments, needed_in, read_lock, wanted

PINS = read_lock()


def closure(requirements: Sequence[Requirement], pins: Sequence[Pin], environment: dict[str, str]) -> set[Pin]:
    """The pins that `requirements` need on such a machine, with what those need.

    What a package needs is read from its own metadata, where the version of the lock is installed here.
    """
    found: set[Pin] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        if not needed_in(requirement.marker, {**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        fit = [pin for pin in pins if pin.name == name and needed_in(pin.requirement.marker, environment)]
        assert len(fit) == 1, f"{requirement} is locked {len(fit)} times for {environment}; run `make lock`"
        assert requirement.specifier.contains(fit[0].version, prereleases=True), f"{requirement}: {fit[0].version}"
        found.add(fit[0])
        for wish in {"", *requirement.extras} - {extra for n, extra in seen if n == name}:
            seen.add((name, wish))
            todo += [(need, wish) for need in needs(fit[0]) or []]
    return found


@cache
def needs(pin: Pin) -> list[Requirement] | None:
    """What a package says it needs; None where that version is not installed here."""
    try:
        installed = metadata.distribution(pin.name)
    except metadata.PackageNotFoundError:
        return None
    return [Requirement(line) for line in installed.requires or []] if installed.version == pin.version else None


@pytest.mark.parametrize(
    "environment", environments(), ids=lambda e: f"{e['python_full_version']}-{e['platform_machine']}"
)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_complete_with_those_before_it(part: str, environment: dict[str, str]) -> None:
    parts = PARTS[: PARTS.index(part) + 1]
    pins = [pin for pin in PINS if pin.part in parts]
    found = closure([requirement for name in parts for requirement in wanted(name)], pins, environment)
    served = {pin for pin in pins if needed_in(pin.requirement.marker, environment)}
    if all(needs(pin) is not None for pin in served):
        assert found == served, "nothing needs some of these"


def test_every_file_is_known_by_its_sum_and_no_place_is_named() -> None:
    for pin in PINS:
        assert pin.hashes and all(re.fullmatch("[0-9a-f]{64}", value) for value in pin.hashes), pin
    text = LOCK.read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    assert [pin.part for pin in PINS] == sorted((pin.part for pin in PINS), key=PARTS.index)


def test_what_is_missing_or_too_old_is_found() -> None:
    environment = next(environments())
    torch = next(pin for pin in PINS if pin.name == "torch")
    with pytest.raises(AssertionError, match="locked 0 times"):
        closure(wanted("run"), [pin for pin in PINS if pin.name != "numpy"], environment)
    with pytest.raises(AssertionError, match="torch>=99"):
        closure([Requirement("torch>=99")], [torch], environment)
