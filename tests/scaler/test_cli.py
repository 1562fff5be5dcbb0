"""The command line as a user meets it: exit codes, one-line errors, tables for people and JSON for scripts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image

from scaler.checkpoint import read_manifest, resolve_checkpoint
from scaler.cli import app, main
from shards.index import ShardIndex
from shards.order import SampleOrder
from tests.images import make_image_folder
from tests.long import only_long

RECIPE = {
    "method": {"name": "simclr", "backbone": "test_vit", "patch_size": 16},
    "data": {"global_batch_size": 7, "image_size": 32, "shuffle_window": 5, "num_workers": 0, "lanes": 3},
    "optim": {"name": "adamw", "lr": 0.001},
    "schedule": {"total": "4 steps"},
    "track": {"log_every": "1 steps", "tensorboard": False, "wandb": "disabled"},
    "run": {"seed": 3},
}


def commands(group: typer.core.TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command there is."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(commands(typer.main.get_command(app)))


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


def scaler(*words: object) -> Result:
    """Run the command line in this process, which spares importing torch each time; exit code and streams are real."""
    out, err = io.StringIO(), io.StringIO()
    argv, show = sys.argv, warnings.showwarning
    sys.argv = ["scaler", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leave:
            main()
    finally:
        sys.argv, warnings.showwarning = argv, show
    return Result(leave.value.code if isinstance(leave.value.code, int) else 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_image_folder(folder, num_images=23, format="mixed")
    return folder


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "shards"
    assert scaler("convert", photos, folder, "--shard-size", "30KB").returncode == 0
    return folder


@pytest.fixture
def run_dir(shards: Path, tmp_path: Path) -> Path:
    """A run directory before its first checkpoint."""
    recipe = {**RECIPE, "data": {**RECIPE["data"], "shards": str(shards)}, "run": {"dir": str(tmp_path), "seed": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = scaler(*command, "--help")
    assert result.returncode == 0
    assert f"Example: scaler {' '.join(command)}" in result.stdout.replace("\n ", "")


def test_the_shell_completes_recipes_and_keys() -> None:
    def complete(*words: str) -> list[str]:
        environment = {**os.environ, "_SCALER_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words) - 1)}
        environment["COMP_WORDS"] = " ".join(words)
        code = "import sys; sys.argv = ['scaler']; from scaler.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("scaler", "recipe", "show", "dinov2/d") == ["dinov2/demo"]
    assert complete("scaler", "train", "dinov2/demo", "strategy.mi") == [
        "strategy.micro_batch_size=",
        "strategy.min_ranks=",
    ]


def test_a_recipe_that_is_shown_is_a_recipe(tmp_path: Path) -> None:
    shown = scaler("recipe", "show", "simclr/demo", "optim.lr=1e-3")
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    again = json.loads(scaler("recipe", "show", tmp_path / "mine.yaml", "--json").stdout)
    assert again["optim"]["lr"] == 1e-3 and again == yaml.safe_load(shown.stdout)
    assert json.loads(scaler("recipe", "list", "--json").stdout)["simclr/demo"].startswith("SimCLR on 32-px images")
    assert scaler("recipe", "schema", "--out", tmp_path / "schema.json").returncode == 0
    assert json.loads((tmp_path / "schema.json").read_text())["title"] == "Recipe"
    assert "did you mean 'simclr/demo'" in scaler("recipe", "show", "simclr/dmo").stderr


def test_a_real_process_starts_fast_and_fails_in_one_line(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = (
        "import scaler.cli, sys; from scaler.recipe import load_recipe, recipe_schema; recipe_schema()\n"
        "for name in ('simclr', 'dinov2', 'supervised'): load_recipe(f'{name}/demo', shards='none')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root) == b"False\n", "--help and recipes need none"
    command = [sys.executable, "-m", "scaler.cli", "index", str(tmp_path / "nothing")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: no .tar files") and not result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["convert", "MISSING", "OUT"], 1, "error: .*MISSING is not a folder"),
        (["convert", "PHOTOS", "OUT", "--shard-size", "big"], 1, "error: 'big' is not a size"),
        (["convert", "PHOTOS"], 2, "Missing argument"),
        (["convert", "PHOTOS", "OUT", "--wrong"], 2, "No such option"),
        (["index", "MISSING"], 1, "error: no .tar files in"),
        (["train", "simclr/nothing"], 2, "error: no recipe 'simclr/nothing'"),
        (["train", "RECIPE", "optim.learning=1"], 2, "error: .*unknown key 'optim.learning'"),
        (["train", "RECIPE", "data.shards=MISSING"], 1, "error: .*MISSING is no folder"),
        (["batch", "MISSING", "--step", "1"], 1, "error: .*MISSING is no run directory"),
        (["batch", "RUN", "--step", "0"], 2, "--step"),
        (["eval", "knn", "RUN", "--train", "SHARDS", "--val", "SHARDS"], 1, "error: .*no checkpoint"),
        (["eval", "knn", "RUN", "--train", "MISSING", "--val", "SHARDS"], 1, "error: .*MISSING is no folder"),
    ],
)
def test_users_errors_are_one_line(
    words: list[str], code: int, message: str, photos: Path, shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    places = {
        "PHOTOS": photos,
        "SHARDS": shards,
        "RUN": run_dir,
        "RECIPE": run_dir / "recipe.yaml",
        "OUT": tmp_path / "o",
    }
    places["MISSING"] = tmp_path / "MISSING"
    for name, path in places.items():
        words = [word.replace(name, str(path)) if word.split("=")[-1] == name else word for word in words]
    result = scaler(*words)
    assert result.returncode == code
    assert "Traceback" not in result.stderr and not result.stdout
    assert [line for line in result.stderr.splitlines() if re.search(message, line)]
    if message.startswith("error:"):
        assert len(result.stderr.splitlines()) == 1


def test_convert_reports_rejected_files_in_its_exit_code(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_image_folder(source, num_images=6, format="png")
    (source / "class_0" / "notes.jpg").write_text("no picture")
    (source / "class_1" / "empty.png").touch()
    result = scaler("convert", source, tmp_path / "shards")
    assert result.returncode == 1
    assert "6 images of 3 classes in 1 shards" in result.stdout
    assert "class_0/notes.jpg: " in result.stderr and "class_1/empty.png: " in result.stderr
    assert "2 files were rejected" in result.stderr
    again = scaler("convert", source, tmp_path / "shards", "--json")
    report = json.loads(again.stdout)
    assert again.returncode == 1 and report["num_skipped_finished"] == 1
    assert sorted(path for path, _ in report["rejected"]) == ["class_0/notes.jpg", "class_1/empty.png"]


def test_options_of_convert_arrive(photos: Path, tmp_path: Path) -> None:
    words = ["--name", "flowers", "--no-shuffle", "--no-labels", "--json-member", "--decode-check", "--workers", "1"]
    assert scaler("convert", photos, tmp_path / "out", *words).returncode == 0
    with tarfile.open(tmp_path / "out" / "flowers-000000.tar") as archive:
        names = archive.getnames()
    keys = [name.rpartition(".")[0] for name in names if name.endswith(".json")]
    assert keys == sorted(keys) and len(keys) == 23 and not any(name.endswith(".cls") for name in names)


def test_index_reads_foreign_shards(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = scaler("index", tmp_path, "--json")
    assert result.returncode == 0
    facts = json.loads(result.stdout)
    assert facts["num_samples"] == 23 and facts["num_shards"] == len(list(shards.glob("*.tar"))) > 2
    only_png = scaler("index", tmp_path, "--image-ext", ".PNG")
    assert only_png.returncode == 0 and only_png.stdout.startswith("8 images")


def test_batch_lists_the_samples_of_any_step(shards: Path, run_dir: Path) -> None:
    index = ShardIndex.load(shards)
    order = SampleOrder(index.shard_sizes, seed=3, lanes=3, shuffle_window=5)
    seen = []
    for step in (1, 2, 3, 4):  # 28 images of 23: the fourth step crosses into the second epoch
        result = scaler("batch", run_dir, "--step", step, "--keys")
        expected = index.keys(order.batch(7 * (step - 1), 7).ids)
        assert result.returncode == 0 and result.stdout.splitlines() == expected
        facts = json.loads(scaler("batch", run_dir, "--step", step, "--json").stdout)
        assert facts["first_image"] == 7 * (step - 1)
        assert [row["key"] for row in facts["samples"]] == expected
        assert [row["position"] for row in facts["samples"]] == list(range(7))
        seen += facts["samples"]
    assert sorted(row["image"] for row in seen) == list(range(28))
    assert sorted(row["id"] for row in seen if row["epoch"] == 0) == list(range(23))
    assert all(row["key"].split("/")[-1] in row["source"] for row in seen)
    table = scaler("batch", run_dir, "--step", 2).stdout.splitlines()
    assert table[0].split("\t") == ["position", "epoch", "key", "source"] and len(table) == 8


def test_the_sheet_shows_the_views(run_dir: Path, tmp_path: Path) -> None:
    """Five rows of two views of 32 pixels, enlarged twice; what is on them is tested in tests/scaler/show."""
    result = scaler("batch", run_dir, "--step", 2, "--sheet", tmp_path / "sheet.png", "--sheet-rows", 5, "--augmented")
    assert result.returncode == 0 and "5 of 7 samples" in result.stdout
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height > 5 * 64 and image.width > 2 * 64
    result = scaler("batch", run_dir, "--step", 2, "--augmented")
    assert result.returncode == 2 and "--sheet" in result.stderr


def test_batch_refuses_other_shards_than_the_runs(shards: Path, photos: Path, tmp_path: Path) -> None:
    overrides = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "run.stop_after=1 steps"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "shards": "set below"}}))
    trained = scaler("train", tmp_path / "recipe.yaml", *overrides)
    assert trained.returncode == 0, trained.stderr
    other = tmp_path / "other"
    assert scaler("convert", photos, other, "--seed", 9).returncode == 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"]["shards"] = str(other)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = scaler("batch", tmp_path / "run", "--step", 1)
    assert result.returncode == 1 and "is not what" in result.stderr and "fingerprint" in result.stderr


def test_a_trained_run_can_be_asked_from_any_folder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(shards.parent)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "shards": shards.name}}))
    trained = scaler("train", tmp_path / "recipe.yaml", f"run.dir={run}", "--processes", 1)
    assert trained.returncode == 0, trained.stderr
    monkeypatch.chdir(tmp_path)
    assert len(scaler("batch", run, "--step", 1, "--keys").stdout.splitlines()) == 7
    options = ["--train", shards, "--val", shards, "--k", 3, "--json", "--crop-fraction", 1.0]
    after = json.loads(scaler("eval", "knn", run, *options).stdout)
    one = json.loads(scaler("eval", "knn", next((run / "checkpoints").glob("step-*4")), *options).stdout)
    before = json.loads(scaler("eval", "knn", run, "--random-init", *options).stdout)
    assert (after["step"], one["step"], before["step"]) == (4, 4, 0)
    assert one["top1"] == after["top1"] and 0 <= before["top1"] <= 1
    assert after["train_samples"] == after["val_samples"] == 23
    nearest = json.loads(scaler("eval", "knn", run, *options[:4], "--k", 1, "--json").stdout)
    assert nearest["top1"] == 1.0, "every sample is its own nearest neighbour"
    table = scaler("eval", "knn", run, *options[:4], "--k", 1).stdout
    assert "top1" in table and "100.0 %" in table


@only_long  # tests/test_readme.py starts two, too
def test_two_processes_are_started_with_the_recipes_strategy(shards: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "data": {**RECIPE["data"], "shards": str(shards), "global_batch_size": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [f"run.dir={tmp_path / 'run'}", "schedule.total=2 steps", "strategy.name=fsdp2", "--processes", 2]
    assert scaler("train", tmp_path / "recipe.yaml", *words).returncode == 0
    saved_by = read_manifest(resolve_checkpoint(tmp_path / "run"))["saved_by"]
    assert (saved_by["strategy"], saved_by["ranks"]) == ("fsdp2", 2)
    with_one_more = [*words[:-1], 3]  # 8 images do not divide by 3 processes
    assert scaler("train", tmp_path / "recipe.yaml", *with_one_more).returncode == 1
