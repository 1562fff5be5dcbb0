"""Who may import whom (the table is below), and that whatever is imported is declared in setup.cfg."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("scaler", "shards", "launch")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

SHARED = ("scaler.collectives", "scaler.transfer")
# A module (by prefix) → the modules of ours (by prefix) that it may import. The longest prefix that fits counts.
MAY_IMPORT = {
    "shards": ["shards"],
    "launch": ["launch", "scaler", "shards"],
    "scaler": ["scaler", "shards"],
    "scaler.cli": ["scaler", "shards", "launch"],
    "scaler.demo": ["scaler", "shards", "launch"],
    "scaler.notebook": ["scaler", "shards", "launch"],
    "scaler.doctor": ["scaler", "shards", "launch"],
    "scaler.methods": ["scaler.methods", "scaler.nn", *SHARED, "scaler.schedules", "shards"],
    "scaler.nn": ["scaler.nn", *SHARED, "shards"],
    "scaler.strategies": ["scaler.strategies", "scaler.methods.base", "scaler.collectives", "shards"],
    "scaler.collectives": [],
    "scaler.transfer": [],
    "scaler.schedules": [],
}
# Concrete methods and strategies, and who may name them; everyone else sees base classes.
CONCRETE = re.compile(
    r"scaler\.methods\.(?!base\b|METHODS|method_class|method_settings)\w+|scaler\.strategies\.(ddp|fsdp2|zero)\b"
)
MAY_SEE_CONCRETE = ("scaler.methods.", "scaler.strategies", "scaler.train", "launch", "scaler.bench", "scaler.plan")
# A package of others → the modules (by prefix) that may import it.
ONLY_IN = {
    "deepspeed": ("scaler.strategies.zero", "scaler.doctor"),
    "accelerate": ("scaler.strategies", "scaler.metrics", "scaler.trackers", "scaler.doctor", "launch"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    if imported.split(".")[0] == "tests":
        return "product code imports nothing of the tests"
    if within(module, "shards") and within(imported, "torch.distributed"):
        return "shards takes rank and world size as arguments"
    for package, users in ONLY_IN.items():
        if within(imported, package) and not any(within(module, user) for user in users):
            return f"{package} is imported in {', '.join(users)} only"
    if imported.split(".")[0] in ROOMS:
        room = max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)
        if not any(within(imported, allowed) for allowed in MAY_IMPORT[room]):
            return f"{room} imports {', '.join(MAY_IMPORT[room]) or 'nothing of ours'} only"
        if CONCRETE.match(imported) and not module.startswith(MAY_SEE_CONCRETE):
            return "only train.py sees concrete methods and strategies"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_rules(path: Path) -> None:
    found = {name: forbidden(module_name(path), name) for name in imports(path)}
    assert {name: why for name, why in found.items() if why} == {}


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("shards.loader", "scaler.recipe.Recipe", False),
        ("shards.loader", "torch.distributed", False),
        ("shards.loader", "torch.utils.data", True),
        ("scaler.loop", "scaler.methods.base.Method", True),
        ("scaler.loop", "scaler.methods.simclr.method.SimCLR", False),
        ("scaler.loop", "scaler.strategies.fsdp2.FSDP2", False),
        ("scaler.recipe", "scaler.methods.METHODS", True),
        ("scaler.train", "scaler.strategies.fsdp2.FSDP2", True),
        ("scaler.methods.dinov2.loss", "scaler.strategies.base.Strategy", False),
        ("scaler.methods.dinov2.loss", "scaler.collectives.World", True),
        ("scaler.loop", "launch.local.run", False),
        ("scaler.cli", "launch.local.run", True),
        ("scaler.loop", "accelerate.Accelerator", False),
        ("scaler.strategies.ddp", "deepspeed", False),
        ("scaler.export", "tests.images", False),
    ],
)
def test_the_rules_themselves(module: str, imported: str, allowed: bool) -> None:
    assert (forbidden(module, imported) is None) == allowed


def declared(*sections: tuple[str, str]) -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for section, key in sections for line in config[section][key].split()]
    return {canonical(re.split(r"[<>=!~;\[]", line)[0]) for line in lines}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("room", ["product", "tests"])
def test_every_imported_package_is_declared(room: str) -> None:
    extras = ("deepspeed", "export", "mlflow", "notebook", "parquet", "remote")  # not everyone wants them
    allowed = declared(("options", "install_requires"), *(("options.extras_require", extra) for extra in extras))
    if room == "tests":
        allowed |= declared(("options.extras_require", "test"))
    allowed |= {"triton"}  # a part of torch where that has CUDA, and asked for nowhere else
    own = {*ROOMS, "tests"}
    distributions = packages_distributions()
    used = {name.split(".")[0] for path in (SOURCES if room == "product" else TESTS) for name in imports(path)}
    others = {name for name in used if name not in sys.stdlib_module_names and name not in own}
    undeclared = {name for name in others if not {canonical(d) for d in distributions.get(name, [name])} & allowed}
    assert undeclared == set()


def test_every_package_of_ours_is_in_the_wheel() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {module_name(path.parent) for path in SOURCES if (path.parent / "__init__.py").exists()}
    assert {module_name(path.parent) for path in SOURCES} == folders, "a folder with code lacks its __init__.py"
    assert listed - {"scaler.configs"} == folders
