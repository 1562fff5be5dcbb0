"""The command `scaler`: each command is a few lines that call a room of the house; a module a group of commands.

Exit codes: 0 success, 1 failure, 2 wrong use, 75 a training that a signal stopped after its checkpoint (start it again
to go on). Errors of the user's making are one line each on stderr that starts with `error:`.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

from scaler.cli.benchmarks import benchmarks
from scaler.cli.checkpoints import checkpoints
from scaler.cli.common import WrongUse
from scaler.cli.data import data
from scaler.cli.doctor import doctoring
from scaler.cli.evaluation import evals
from scaler.cli.exporting import exporting
from scaler.cli.planning import planning
from scaler.cli.recipes import recipes
from scaler.cli.show import show
from scaler.cli.training import training

app = typer.Typer(
    help="Self-supervised training of vision models from WebDataset shards.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data)
app.add_typer(training)
app.add_typer(planning)
app.add_typer(evals, name="eval")
app.add_typer(show, name="show")
app.add_typer(exporting)
app.add_typer(doctoring)
app.add_typer(checkpoints, name="checkpoint")
app.add_typer(recipes, name="recipe")
app.add_typer(benchmarks, name="bench")


def main() -> None:
    """Run the command line; user errors become one line on stderr each."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        for line in _lines(error):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WrongUse) else 1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _lines(error: Exception) -> list[str]:
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    return str(error).splitlines() or [type(error).__name__]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"scaler {metadata.version('scaler')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass
