"""Recipes: overrides, defaults, and errors that name the key, the rule and the nearest valid name."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from scaler.methods import METHODS
from scaler.recipe import (
    Optim,
    Recipe,
    _Loader,
    find_recipe,
    load_recipe,
    override_words,
    recipe_schema,
    shipped_recipes,
)

DEMO = "simclr/demo"


def test_a_short_name_works_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("simclr/demo", "simclr/demo.yaml", "configs/simclr/demo.yaml"):
        assert find_recipe(name).name == "demo.yaml"
    recipe = load_recipe("dinov2/demo", overrides=["data.shards=x"])
    assert recipe.method.name == "dinov2" and recipe.run.dir == "runs/dinov2-demo"


def test_overrides_are_yaml_with_proper_floats():
    recipe = load_recipe(
        DEMO,
        overrides=["optim.lr=1e-3", "--optim.clip_norm=null", "schedule.total=20 steps", "run.deterministic=true",
                   "checkpoint.allow_changes=[optim.lr, data]", "checkpoint.every=30 minutes"],
    )  # fmt: skip
    assert recipe.optim.lr == 1e-3 and recipe.optim.clip_norm is None
    assert recipe.schedule.total == "20 steps" and recipe.run.deterministic is True
    assert recipe.checkpoint.allow_changes == ("optim.lr", "data") and recipe.checkpoint.every == "30 minutes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown key 'optim\.learning_rate'"),
        ("optim.weight_decya=1", r"did you mean 'weight_decay'"),
        ("metod.name=x", r"unknown key 'metod'; did you mean 'method'"),
        ("method.temprature=1", r"unknown key 'method\.temprature'; did you mean 'temperature'"),
        ("method.name=simclrr", r"no method 'simclrr'; did you mean 'simclr'"),
        ("optim.lr=-1", r"optim\.lr: Input should be greater than 0 \(got -1\)"),
        ("schedule.total=10", r"schedule\.total: '?10'? is no duration"),
        ("schedule.total=10 steps 2 epochs", "is no duration"),
        ("strategy.name=zero9", r"strategy\.name.*'ddp'"),
        ("track.log_every=1 epochs", "counted in steps"),
        ("optim.lr", "is not key=value"),
        ("optim.lr.x=1", "is a value, not a section"),
        ("data.global_batch_size=0", r"global_batch_size: .*greater than 0"),
        ("method.blur_kernel=4", r"demo\.yaml: method\.blur_kernel 4 must be odd.*no blur\)$"),
        ("optim.lr={1", "is not a YAML value"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(DEMO, overrides=[override])
    assert "\n" not in str(error.value)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'dinov2/dmeo'.*did you mean 'dinov2/demo'"):
        load_recipe("dinov2/dmeo")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(str(broken))
    broken.write_text("just text")
    with pytest.raises(ValueError, match="holds no mapping"):
        load_recipe(str(broken))
    broken.write_text("method: {name: simclr}")
    with pytest.raises(ValueError, match="is missing and has no default"):
        load_recipe(str(broken))


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(DEMO, overrides=["data.shards=x"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe(str(path)) == recipe


def test_every_recipe_of_the_repository_is_valid():
    folder = find_recipe(DEMO).parent.parent
    paths = sorted(path for name in METHODS for path in (folder / name).glob("*.yaml"))
    assert len(paths) >= 2 * len(METHODS)
    for path in paths:
        recipe = load_recipe(str(path), overrides=["data.shards=x"])
        assert recipe.method.name == path.parent.name
        assert path.read_text().startswith("#"), f"{path.name} has no header"


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", 0.3), ("linear_256", 0.3 * 16), ("sqrt_1024", 0.6), ("sqrt", 0.3 * 64)]
)
def test_lr_rules(rule, expected):
    assert Optim(lr=0.3, lr_rule=rule).scaled_lr(4096) == pytest.approx(expected)
    # The two published SimCLR rules meet at 4,096 images.
    assert 0.075 * math.sqrt(4096) == pytest.approx(0.3 * 4096 / 256)


def test_the_schema_is_that_of_every_recipe_and_of_no_misspelled_one():
    schema = jsonschema.Draft202012Validator(json.loads(json.dumps(recipe_schema())))
    assert list(schema.schema["properties"]) == list(Recipe.model_fields)
    for path in shipped_recipes().values():
        values = yaml.load(path.read_text(), Loader=_Loader)
        assert not list(schema.iter_errors(values)), path
    for section, key in (("method", "temprature"), ("method", "momentum_teacher"), ("optim", "learning_rate")):
        values = yaml.load(find_recipe(DEMO).read_text(), Loader=_Loader)
        values[section][key] = 1
        assert list(schema.iter_errors(values)), key


def test_a_run_directory_may_name_values(tmp_path):
    recipe = load_recipe(
        DEMO, overrides=["data.shards=a/b", "run.dir=runs/lr{optim.lr}-{schedule.total}-{data.shards}", "optim.lr=1e-5"]
    )
    assert recipe.run.dir == f"runs/lr1e-05-{recipe.schedule.total.replace(' ', '')}-a-b"
    with pytest.raises(ValueError, match=r"run\.dir: no key 'optim\.rl'.*did you mean 'optim\.lr'"):
        load_recipe(DEMO, overrides=["data.shards=x", "run.dir=runs/{optim.rl}"])


def test_a_sweeps_agent_makes_overrides_that_fit(monkeypatch):
    """The command that W&B's own agent makes of our sweep file, read as `python -m scaler.train` would."""
    sweep = yaml.safe_load((find_recipe(DEMO).parents[1] / "sweeps" / "simclr.yaml").read_text())
    trial = {"optim.lr": 0.00025, "optim.weight_decay": 0.1, "method.temperature": 0.2}
    assert set(trial) == set(sweep["parameters"])
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in trial.items()}})
    command = [
        word
        for item in create_sweep_command(sweep["command"])
        for word in (args["args_no_hyphens"] if item == "${args_no_hyphens}" else [item])
    ]
    assert command[:4] == ["${env}", "python", "-m", "scaler.train"]
    recipe = load_recipe(command[4], overrides=command[5:])
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.method.temperature) == tuple(trial.values())
    assert recipe.run.dir == "runs/sweep/lr0.00025-wd0.1-t0.2" and recipe.track.wandb == "online"


def test_words_for_the_shell():
    assert "strategy.name=" in override_words("") and not any(w.startswith("method.t") for w in override_words(""))
    assert {"strategy.name=fsdp2", "strategy.compile=true"} <= {*override_words("strategy.name="), *override_words("=")}
    assert "method.temperature=" in override_words("method.")
    for word in override_words("="):  # each is a real override
        load_recipe(DEMO, overrides=["data.shards=x", word.replace("=step", "=constant")])
