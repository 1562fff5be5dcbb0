"""The lock: every package, at one version, with the sha256 of each file that may be installed for it.

    make lock                                           # after a change of setup.cfg: what fits keeps its version
    make lock UPGRADE="--upgrade-package timm"          # a newer one; UPGRADE=--upgrade for all

`requirements.lock` is what pip reads with --require-hashes. Its parts follow one another, so that whoever wants less
stops reading earlier: [build] what builds the others, [run] the package with its extras (the container stops here),
[test] the rest. It serves CPython 3.11 and 3.12 on Linux, x86-64 and aarch64, and holds no other file's hash.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
PARTS = ("build", "run", "test")

PYTHONS = ("3.11.0", "3.11.99", "3.12.0", "3.12.99")  # the first and the last of each: markers may tell them apart
MACHINES = ("x86_64", "aarch64")
_GLIBC = range(5, 37)  # 2.5 to 2.36, which Debian 12 has
_LEGACY = ("manylinux1", "manylinux2010", "manylinux2014", "linux")

_HEADER = """\
# Made by `make lock` from setup.cfg and pyproject.toml: every package, with the sha256 of its files for Linux (x86-64,
# aarch64) and CPython 3.11 and 3.12. `make venv` installs all of it; launch/container/Dockerfile stops before [test].
"""


@dataclass(frozen=True)
class Pin:
    """One package of the lock: its requirement (`name==version`, perhaps with a marker), its part, its sha256 sums."""

    requirement: Requirement
    part: str
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (only,) = self.requirement.specifier
        assert only.operator == "==", self.requirement
        return only.version


def read_lock(path: Path = LOCK) -> list[Pin]:
    """What is in the lock, in its order."""
    pins, part = [], ""
    for line in path.read_text().replace("\\\n", "").splitlines():
        if found := re.fullmatch(r"# \[(\w+)\].*", line):
            part = found[1]
        elif line and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
            pins.append(Pin(Requirement(requirement), part, tuple(hashes)))
    return pins


def wanted(part: str) -> list[Requirement]:
    """What the project itself asks for in a part of the lock; a part's packages need those of the parts before it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = dict(config["options.extras_require"])
    test = extras.pop("test")
    lines = {
        "build": ["pip", *tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]],
        "run": [config["options"]["install_requires"], *extras.values()],
        "test": [test],
    }[part]
    return [Requirement(line) for text in lines for line in text.splitlines() if line]


def environments() -> Iterator[dict[str, str]]:
    """The machines that the lock serves, as markers see them."""
    for python in PYTHONS:
        for machine in MACHINES:
            yield {
                "extra": "",
                "implementation_name": "cpython",
                "implementation_version": python,
                "os_name": "posix",
                "platform_machine": machine,
                "platform_python_implementation": "CPython",
                "platform_release": "",
                "platform_system": "Linux",
                "platform_version": "",
                "python_full_version": python,
                "python_version": python.rpartition(".")[0],
                "sys_platform": "linux",
            }


def needed_in(marker: Marker | None, environment: dict[str, str]) -> bool:
    """Whether what carries this marker is wanted on such a machine."""
    return marker is None or marker.evaluate(environment)


def main(arguments: Sequence[str]) -> None:
    """Write the lock anew; `arguments` go to `uv pip compile`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = ("python_version", "platform_machine", "sys_platform", "platform_python_implementation")
        served = {" and ".join(f"{name} == '{one[name]}'" for name in names) for one in environments()}
        (folder / "pyproject.toml").write_text(f"[tool.uv]\nenvironments = {sorted(served)}\n")

        pins = "\n".join(str(pin.requirement) for pin in read_lock())
        everything = [requirement for part in PARTS for requirement in wanted(part)]
        _resolve(folder, everything, *arguments, output="pins.txt", before=pins)
        parts = {name: "test" for name in _names(folder / "pins.txt")}
        for part, inputs in {"run": wanted("build") + wanted("run"), "build": wanted("build")}.items():
            _resolve(folder, inputs, "--constraint", "pins.txt", output=f"{part}.txt")
            parts |= dict.fromkeys(_names(folder / f"{part}.txt"), part)
        _resolve(folder, everything, "--constraint", "pins.txt", "--format", "pylock.toml", output="pylock.toml")
        packages = tomllib.loads((folder / "pylock.toml").read_text())["packages"]

    text = _HEADER
    for part in PARTS:
        text += f"\n# [{part}]\n"
        text += "".join(_lines(package) for package in packages if parts[package["name"]] == part)
    LOCK.write_text(text)


def _resolve(folder: Path, inputs: Iterable[Requirement], *options: str, output: str, before: str = "") -> None:
    """Let uv choose versions for `inputs`; it prefers those that `output` holds `before`."""
    (folder / "wanted.in").write_text("".join(f"{requirement}\n" for requirement in inputs))
    if before:
        (folder / output).write_text(before)
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0]]
    command += ["--no-header", "--no-annotate", "--output-file", output, *options, "wanted.in"]
    subprocess.run(command, cwd=folder, check=True)


def _names(path: Path) -> list[str]:
    return [canonicalize_name(Requirement(line).name) for line in path.read_text().splitlines()]


def _lines(package: dict[str, Any]) -> str:
    """A package as pip reads it, with the hashes of the files that some machine of ours may install."""
    marker = Marker(package["marker"]) if "marker" in package else None
    served = [environment for environment in environments() if needed_in(marker, environment)]
    hashes = set()
    for environment in served:
        tags = _tags(environment)
        wheels = {
            wheel["hashes"]["sha256"]
            for wheel in package.get("wheels", [])
            if not tags.isdisjoint(parse_wheel_filename(wheel["url"].rpartition("/")[2])[3])
        }
        hashes |= wheels or {package["sdist"]["hashes"]["sha256"]}
    if not served:
        return ""
    everywhere = len(served) == len(PYTHONS) * len(MACHINES)
    requirement = f"{package['name']}=={package['version']}" + ("" if everywhere else f" ; {marker}")
    return " \\\n".join([requirement, *(f"    --hash=sha256:{value}" for value in sorted(hashes))]) + "\n"


def _tags(environment: dict[str, str]) -> set[Tag]:
    """The tags of the wheels that such a machine takes."""
    python = Version(environment["python_version"]).release
    kinds = [*(f"manylinux_2_{minor}" for minor in _GLIBC), *_LEGACY]
    platforms = [f"{kind}_{environment['platform_machine']}" for kind in kinds]
    return {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}


if __name__ == "__main__":
    main(sys.argv[1:])
