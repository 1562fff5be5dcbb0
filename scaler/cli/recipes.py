"""Recipes: what there is, what one says with every default, and the schema by which editors complete them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scaler.cli.common import Json, Overrides, RecipeName, WrongUse, group

recipes = group("See recipes, and what may stand in one.")


@recipes.command("list", epilog="Example: scaler recipe list")
def list_recipes(as_json: Json = False) -> None:
    """The recipes that come with the toolkit, with the first sentence of each."""
    from scaler.recipe import shipped_recipes

    known = {name: _sentence(path) for name, path in shipped_recipes().items()}
    if as_json:
        print(json.dumps(known))
        return
    for name, text in known.items():
        print(f"{name:<{max(map(len, known))}}  {text}")


@recipes.command("show", epilog="Example: scaler recipe show simclr/demo optim.lr=1e-3 > mine.yaml")
def show_recipe(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """A recipe as a run would read it: with every default, and the values given here. A recipe itself."""
    import yaml

    from scaler.recipe import load_recipe

    try:  # where the images are is no part of most recipes
        values = load_recipe(recipe, overrides=overrides or [], shards="shards/train").model_dump(mode="json")
    except ValueError as error:
        raise WrongUse(str(error)) from None
    print(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False, width=100), end="")


@recipes.command("schema", epilog="Example: scaler recipe schema --out recipe.schema.json")
def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file.", show_default="standard output")] = None,
) -> None:
    """The JSON schema of recipes. An editor with a YAML language server completes and checks a recipe whose first line
    is `# yaml-language-server: $schema=recipe.schema.json`."""
    from scaler.recipe import recipe_schema

    text = json.dumps(recipe_schema(), indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)


def _sentence(path: Path) -> str:
    """The first sentence of a recipe's header."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")).split("  ")[0]
    return header.split(". ")[0].rstrip(".")
