"""What the commands share: options, errors of use, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Workers = Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def complete_recipe(incomplete: str) -> list[str]:
    """For the shell: recipes by short name, and files."""
    from scaler.recipe import shipped_recipes

    files = [str(path) for path in Path().glob(f"{incomplete}*") if path.is_dir() or path.suffix == ".yaml"]
    return [name for name in [*shipped_recipes(), *sorted(files)] if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """For the shell: the recipe's keys, and for a key with few values these."""
    from scaler.recipe import override_words

    return [word for word in override_words(incomplete) if word.startswith(incomplete)]


RecipeName = Annotated[
    str, typer.Argument(help="A YAML file, or a short name such as dinov2/demo.", autocompletion=complete_recipe)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as optim.lr=1e-3.", autocompletion=complete_override),
]


class WrongUse(ValueError):
    """The command itself cannot be right; exit code 2."""


def group(text: str) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


def print_table(values: dict[str, Any]) -> None:
    """Names and values in two columns, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    Console().print(table)
