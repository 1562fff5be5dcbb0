"""The wheel is complete: what it installs finds its recipes and launcher files far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), environment=dict(os.environ))


def build(folder: Path, *, environment: dict[str, str]) -> Path:
    """A folder with the unpacked wheel, built from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("scaler", "shards", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def test_every_file_of_the_sources_is_in_the_wheel(installed: Path) -> None:
    places = {"scaler": "scaler", "shards": "shards", "launch": "launch", "configs": "scaler/configs"}
    for source, place in places.items():
        files = {
            str(path.relative_to(ROOT / source))
            for path in (ROOT / source).rglob("*")
            # for a checkout: launch/container, from which images are built, and what was measured with scaler/bench
            if path.is_file()
            and not {"__pycache__", "container", "results"} & {*path.parts}
            and path.suffix not in (".c", ".so")
        }
        assert files <= {str(path.relative_to(installed / place)) for path in (installed / place).rglob("*")}


def test_recipes_are_found_by_their_short_name(installed: Path, tmp_path: Path) -> None:
    code = (
        "import scaler, pathlib; from scaler.recipe import find_recipe, load_recipe\n"
        "print(pathlib.Path(scaler.__file__).parent)\n"
        "for name in ('simclr/demo', 'dinov2/demo'): print(find_recipe(name)); load_recipe(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    recipes = [installed / "scaler/configs" / name / "demo.yaml" for name in ("simclr", "dinov2")]
    assert result.stdout.splitlines() == [str(path) for path in (installed / "scaler", *recipes)]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_kernel_is_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert cutter(installed, tmp_path) == "cut_with_kernel"


def test_without_a_compiler_it_installs_and_runs_all_the_same(tmp_path: Path) -> None:
    folder = build(tmp_path, environment={**os.environ, "CC": "false"})
    assert not list(folder.rglob("*.so"))
    assert cutter(folder, tmp_path) == "cut_with_torch"


def cutter(installed: Path, folder: Path) -> str:
    """The function that cuts views, in a process that sees this installation and not the editable one."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "from shards.resize import cut; print(cut.__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
