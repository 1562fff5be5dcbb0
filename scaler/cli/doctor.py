"""What would stop a training here, and how to mend it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaler.cli.common import Json, Overrides, WrongUse

if TYPE_CHECKING:
    from scaler.doctor.finding import Finding

doctoring = typer.Typer()


@doctoring.command(epilog="Example: scaler doctor dinov2/vits16_in1k data.shards=shards/train --processes 8")
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or a short name: what it needs is checked too.")
    ] = None,
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Shards to look at, instead of the recipe's.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Where a run would write, instead of the recipe's.")] = None,
    hosts: Annotated[Path | None, typer.Option(help="Hostfile: look at each of these machines over ssh.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="On each machine, one per GPU.", show_default="slots or GPUs, else 1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where they would meet.", show_default="29500")
    ] = None,
    feed: Annotated[
        Path | None, typer.Option(help="What scaler bench feed --out wrote: are there cores enough for its step?")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only this installation, in seconds; GPUs are left alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look for what would stop a training, or slow it down, and say how to mend it; exit code 1 if anything would.

    Under torchrun or accelerate (`torchrun … -m scaler.cli doctor`) the processes also add up tensors together: whether
    the sums are right, and how fast they come. `--quick` is made for the healthcheck of a container.
    """
    from scaler.doctor.checks import run_check
    from scaler.doctor.finding import Finding, first_line, worst

    started = time.monotonic()
    if recipe is not None and "=" in recipe:
        raise WrongUse(f"{recipe!r} is no recipe; name one first, as dinov2/vits16_in1k")
    try:
        from scaler.doctor.examine import examine

        findings = examine(
            recipe,
            overrides or [],
            shards=shards,
            run_dir=run_dir,
            hosts=hosts,
            processes=processes,
            port=port,
            feed=feed,
            quick=quick,
        )
    except ImportError as error:  # not even the recipe's classes: what is missing is known without them
        found = f"cannot be imported: {first_line(error)}"
        findings = [
            *run_check("versions", {}),
            Finding("error", "scaler", found, "pip install --force-reinstall scaler"),
        ]
    except ValueError as error:
        raise WrongUse(str(error)) from None
    if os.environ.get("RANK", "0") == "0" or worst(findings[-1:]) == "error":  # which the others may not know of
        _show(findings, as_json=as_json, seconds=time.monotonic() - started)
    if worst(findings) == "error":
        raise typer.Exit(1)


def _show(findings: list[Finding], *, as_json: bool, seconds: float) -> None:
    """A line for each finding, and one below for its fix, never broken, so that commands can be copied."""
    from rich.console import Console
    from rich.text import Text

    from scaler.doctor.finding import counted

    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "error")}
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], **counts, "seconds": seconds}))
        return
    console = Console(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        host = f"{finding.host}: " if finding.host else ""
        level, check = (f"{finding.level:8}", colours[finding.level]), f"{finding.check:{width + 2}}"
        console.print(Text.assemble(level, check, host, finding.found))
        if finding.fix:
            console.print(Text.assemble(" " * (width + 10), ("→ " + finding.fix, "bold")))
    said = f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}"
    console.print(f"{said}, {seconds:.0f} s")
