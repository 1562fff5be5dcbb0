"""Checkpoints: looked at, checked, rewritten."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer

from scaler.cli.common import Json, group, print_table

checkpoints = group("Look at, check and rewrite checkpoints.")

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run (its newest): path or URL, as s3://….")
]


@checkpoints.command("show", epilog="Example: scaler checkpoint show runs/first --tensors")
def show_checkpoint(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    as_json: Json = False,
) -> None:
    """Step, images, who saved it, and the size of the method's weights, the teacher's and the optimiser's state."""
    from scaler.checkpoint.tools import describe

    facts = describe(checkpoint)
    listed = facts.pop("tensors")
    if as_json:
        print(json.dumps({**facts, "tensors": listed} if tensors else facts))
        return
    saved_by = ", ".join(f"{key} {value}" for key, value in facts.pop("saved_by").items())
    sizes = {f"{part} MB": f"{size / 1e6:.2f}" for part, size in facts.pop("bytes").items()}
    print_table({**facts, "saved by": saved_by, **sizes, "tensors": len(listed)})
    if tensors:
        for name, entry in listed.items():
            print(name, entry["dtype"], "x".join(map(str, entry["shape"])) or "scalar", sep="\t")


@checkpoints.command("verify", epilog="Example: scaler checkpoint verify s3://bucket/run")
def verify_checkpoint(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Read every byte: sizes, sha256, ranges without holes; one line per problem, and exit code 1 if there is any."""
    from scaler.checkpoint import resolve_checkpoint
    from scaler.checkpoint.manifest import problems

    location = resolve_checkpoint(checkpoint)
    found = problems(location)
    if as_json:
        print(json.dumps({"checkpoint": str(location), "problems": found}))
    elif not found:
        print(f"{location} is whole")
    else:
        print("\n".join(found), file=sys.stderr)
    if found:
        raise typer.Exit(1)


@checkpoints.command(
    "convert", epilog="Example: scaler checkpoint convert runs/first model.safetensors --part teacher --prefix teacher."
)
def convert_checkpoint(
    source: Checkpoint,
    destination: Annotated[str, typer.Argument(help="FILE.safetensors of whole weights, or a path or URL to copy to.")],
    part: Annotated[
        Literal["method", "student", "teacher", "all"],
        typer.Option(help="For a file: whose weights; all: the optimiser's state too."),
    ] = "method",
    prefix: Annotated[str, typer.Option(help="For a file: only names that begin so, without it.")] = "",
    files: Annotated[
        int | None, typer.Option(min=1, help="Otherwise: how many files.", show_default="as many as now")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as one plain safetensors file, or once more as a checkpoint in another place."""
    from scaler.checkpoint.tools import convert as rewrite

    done = rewrite(source, destination, part=part, prefix=prefix, num_files=files)
    if as_json:
        print(json.dumps(done))
    else:
        print(f"{done['tensors']} tensors, {done['bytes'] / 1e6:.2f} MB in {done['destination']}")
