"""Which packages are installed, and whether they fit scaler and each other, by what each of them declares.

Nothing is imported: an installation that is broken can still be read.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scaler.doctor.finding import Finding

_SHOWN = ("torch", "torchvision", "timm", "accelerate", "deepspeed")
_TESTED_BELOW = (3, 13)


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """Python, the packages that scaler asks for, and what the main ones among them ask for in turn."""
    yield _python()
    try:
        own = metadata.distribution("scaler")
    except metadata.PackageNotFoundError:
        yield Finding(
            "warning",
            "scaler",
            "not installed, only found in the current folder: which versions it needs is not known",
            "pip install -e .",
        )
        return
    problems = [*_unfit(own), *(p for name in _SHOWN if (found := _installed(name)) for p in _unfit(found))]
    problems += _shadowed()
    yield from problems
    if not problems:
        versions = {name: found.version for name in _SHOWN if (found := _installed(name))}
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Finding("ok", "packages", f"scaler {own.version} with {shown}: they fit each other", facts=versions)


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= _TESTED_BELOW:
        return Finding("warning", "Python", f"{found}: not tested yet", "use Python 3.11 or 3.12")
    return Finding("ok", "Python", found)


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _unfit(package: metadata.Distribution) -> Iterator[Finding]:
    """What `package` needs and does not have; of optional packages, those that are there in a wrong version."""
    name = package.metadata["Name"]
    for line in package.requires or []:
        wanted = Requirement(line)
        optional = "extra ==" in (str(wanted.marker) if wanted.marker else "")
        if optional and (name != "scaler" or "test" in str(wanted.marker)):
            continue
        if wanted.marker and not optional and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed(wanted.name)
        if found is None and not optional:
            fix = f"pip install '{wanted.name}{wanted.specifier}'"
            yield Finding("error", wanted.name, f"missing; {name} {package.version} needs it", fix)
        elif found is not None and not wanted.specifier.contains(found.version, prereleases=True):
            yield Finding(
                "error",
                wanted.name,
                f"{found.version} is installed, {name} {package.version} wants {wanted.specifier}",
                _install(name, wanted),
            )


def _install(package: str, wanted: Requirement) -> str:
    """What brings both together. torch is kept as it is where torchvision wants another one: it fits the driver."""
    if package == "torchvision" and wanted.name == "torch" and (torch := _installed("torch")):
        return f"pip install --upgrade 'torch=={torch.version.partition('+')[0]}' torchvision"
    together = [] if package == "scaler" else [package]
    return " ".join(["pip install --upgrade", f"'{wanted.name}{wanted.specifier}'", *together])


def _shadowed() -> Iterator[Finding]:
    """Packages that are installed twice: one hides the other, and the files of both may be mixed."""
    versions: dict[str, list[str]] = {}
    for found in metadata.distributions():
        if (name := canonicalize_name(found.metadata["Name"] or "")) in (*_SHOWN, "scaler"):
            versions.setdefault(str(name), []).append(found.version)
    for package, several in versions.items():
        if len(set(several)) > 1:
            where = ", ".join(sorted(str(d.locate_file("")) for d in metadata.distributions(name=package)))
            yield Finding(
                "warning",
                package,
                f"installed as {' and '.join(several)}, in {where}; the first one counts",
                f"pip uninstall {package}, until it is gone, and install it again; empty PYTHONPATH",
            )
