"""The command `scaler`: each command is a few lines that call a room of the house.

Exit codes: 0 success, 1 failure, 2 wrong use, 75 a training that a signal stopped after its checkpoint (start it again
to go on). Errors of the user's making are one line each on stderr that starts with `error:`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    help="Self-supervised training of vision models from WebDataset shards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evals = typer.Typer(help="Measure what a checkpoint has learned.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evals, name="eval")
checkpoints = typer.Typer(help="Look at, check and rewrite checkpoints.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(checkpoints, name="checkpoint")
benchmarks = typer.Typer(help="Measure what things cost on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(benchmarks, name="bench")

_SHOWN = 20  # rejected files that are listed without --json

Workers = Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run (its newest): path or URL, as s3://….")
]


class WrongUse(ValueError):
    """The command itself cannot be right; exit code 2."""


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


@app.command(epilog="Example: scaler convert photos/train shards/train --shard-size 256MB")
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of images, or of class folders.")],
    destination: Annotated[Path, typer.Argument(help="Folder for the shards and their index.")],
    name: Annotated[str, typer.Option(help="Shards are called NAME-000000.tar, …")] = "shard",
    shard_size: Annotated[str, typer.Option(help="Bytes of a shard, as 256MB or 1GiB.")] = "256MB",
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of the order in which files go into shards.")] = 0,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Or in the order of paths.")] = True,
    labels: Annotated[
        bool | None,
        typer.Option("--labels/--no-labels", help="Folders are classes, or not.", show_default="as it looks"),
    ] = None,
    json_member: Annotated[bool, typer.Option("--json-member", help="Add path, width and height as KEY.json.")] = False,
    decode_check: Annotated[bool, typer.Option("--decode-check", help="Decode every image whole (slow).")] = False,
    as_json: Json = False,
) -> None:
    """Write a folder of images as WebDataset shards; interrupted and repeated, it goes on.

    Bytes are kept as they are. Files that are no readable image are listed with the reason, and the exit code is 1.
    """
    from shards.convert import convert as convert_folder

    report = convert_folder(
        source,
        destination,
        name=name,
        shard_size=shard_size,
        workers=workers,
        seed=seed,
        shuffle=shuffle,
        labels=labels,
        json_member=json_member,
        decode_check=decode_check,
        progress=not as_json,
    )
    rejected, ignored = ([list(pair) for pair in pairs] for pairs in (report.rejected, report.ignored))
    if as_json:
        print(json.dumps({**vars(report), "rejected": rejected, "ignored": ignored}))
    else:
        print(
            f"{report.num_samples} images of {len(report.class_names)} classes in {report.num_shards} shards "
            f"({report.num_bytes / 1e6:.1f} MB) in {destination}"
            + (f"; {report.num_skipped_finished} shards were there already" if report.num_skipped_finished else "")
            + (f"; {len(ignored)} files that are no images were left out" if ignored else "")
        )
        _list_rejected(rejected, "files were rejected")
    if rejected:
        raise typer.Exit(1)


@app.command(epilog="Example: scaler index shards/laion --workers 8")
def index(
    destination: Annotated[Path, typer.Argument(help="Folder that holds the .tar files.")],
    workers: Workers = None,
    image_ext: Annotated[
        list[str] | None,
        typer.Option(help="Ending of the images; may be given again.", show_default="jpg jpeg png webp"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Index shards that were made elsewhere (img2dataset, tar, webdataset), so that they can be trained on."""
    from shards.folder import IMAGE_EXTENSIONS
    from shards.index import build_index

    shards = build_index(
        destination,
        workers=workers,
        image_extensions=[ending.removeprefix(".").lower() for ending in image_ext or IMAGE_EXTENSIONS],
        progress=not as_json,
    )
    skipped = [list(pair) for pair in shards.skipped()]
    if as_json:
        facts = {"num_samples": shards.num_samples, "num_shards": len(shards.shard_names)}
        print(json.dumps({**facts, "class_names": shards.class_names, "skipped": skipped}))
        return
    print(
        f"{shards.num_samples} images of {len(shards.class_names)} classes in {len(shards.shard_names)} shards, "
        f"fingerprint {shards.fingerprint[:12]}"
    )
    _list_rejected(skipped, "members were left out")


def _list_rejected(pairs: list[list[str]], what: str) -> None:
    for path, reason in pairs[:_SHOWN]:
        print(f"{path}: {reason}", file=sys.stderr)
    if len(pairs) > _SHOWN:
        print(f"… and {len(pairs) - _SHOWN} more; --json lists them all", file=sys.stderr)
    if pairs:
        print(f"{len(pairs)} {what}", file=sys.stderr)


@app.command(epilog="Example: scaler train dinov2/demo data.shards=shards/train run.dir=runs/first --processes 2")
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name such as dinov2/demo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as optim.lr=1e-3.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
) -> None:
    """Train, or go on training where the run directory's newest checkpoint stands.

    Several processes are started through Accelerate's launcher, with the configuration for the recipe's strategy.
    """
    from launch.local import run, train_command
    from scaler.recipe import load_recipe
    from shards.index import ShardIndex

    try:
        checked = load_recipe(recipe, overrides=overrides or [])
    except ValueError as error:
        raise WrongUse(str(error)) from None
    ShardIndex.load(checked.data.shards)  # said once here, instead of by every process
    command = train_command(recipe, overrides or [], processes=processes, strategy=checked.strategy.name)
    raise typer.Exit(run(command, processes=processes))


@app.command(epilog="Example: scaler launch torchrun dinov2/vitl16_in1k --hosts hostfile --run strategy.name=fsdp2")
def launch(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="accelerate, deepspeed, torchrun, slurm or kubernetes.")],
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name such as dinov2/demo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as optim.lr=1e-3.")
    ] = None,
    hosts: Annotated[Path | None, typer.Option(help="Hostfile: a line `NAME slots=N` for each machine.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines.", show_default="all of the hostfile, else 1")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="On each, one per GPU.", show_default="the hostfile's slots, else 1")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where they meet on the first machine.")] = 29500,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Times to start again when a process died.", show_default="3")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For every process; repeatable.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit, as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: where to run.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: who pays.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Slurm: another option of sbatch; repeatable.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: a container image with scaler in it.")] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(metavar="CLAIM:/PATH", help="Kubernetes: a volume claim, and where to mount it; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Kubernetes: of the JobSet.", show_default="the run directory's")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes: where to run.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Slurm, Kubernetes: on each machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="Slurm, Kubernetes: on each machine, in their words.")] = None,
    gpus: Annotated[
        bool | None,
        typer.Option("--gpus/--no-gpus", help="Slurm, Kubernetes: one for each process.", show_default="gpus"),
    ] = None,
    grace: Annotated[
        int | None,
        typer.Option(min=1, help="Slurm, Kubernetes: seconds to save in before the end.", show_default="120 and 300"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at the hosts instead: one line a problem.")] = False,
    execute: Annotated[bool, typer.Option("--run", help="Look at the hosts, then run it.")] = False,
    as_json: Json = False,
) -> None:
    """Print exactly what starts a training with a launcher or scheduler, or run it.

    The command is printed for each host where they differ, with the host's name; for a scheduler it is a file.
    """
    from launch import KINDS, make_job, plan, run
    from launch.check import check_hosts
    from scaler.recipe import load_recipe, nearest

    if kind not in KINDS:
        raise WrongUse(f"no kind of launch {kind!r}; {nearest(kind, list(KINDS))}")
    if as_json and execute:
        raise WrongUse("--json prints what would be run; leave out --run")
    if kind == "deepspeed" and max_restarts is not None:
        raise WrongUse(
            "deepspeed starts no dead process again; use torchrun or accelerate, or leave out --max-restarts"
        )
    if kind in ("slurm", "kubernetes") and hosts is not None:
        raise WrongUse(f"{kind} chooses the machines itself; give --nodes instead of --hosts")
    asked = {
        "time": time,
        "partition": partition,
        "account": account,
        "sbatch": sbatch,
        "image": image,
        "claim": claim,
        "name": name,
        "namespace": namespace,
        "cpus": cpus,
        "memory": memory,
        "gpus": gpus,
        "grace": grace,
    }
    try:
        checked = load_recipe(recipe, overrides=overrides or [])
        job = make_job(
            recipe,
            overrides or [],
            settings=checked.strategy,
            hostfile=hosts,
            nodes=nodes,
            processes=processes,
            port=port,
            max_restarts=max_restarts,
            environment=env or [],
        )
        planned = plan(kind, job, **{option: value for option, value in asked.items() if value is not None})
    except ValueError as error:
        raise WrongUse(str(error)) from None
    report = check_hosts(job, checked, kind=kind) if check or execute else None
    if report is not None and not as_json:
        report.show()
    if as_json:
        print(json.dumps({**vars(planned), "problems": report and report.problems}))
    elif not check:
        print(planned.text, end="", flush=True)
    if report is not None and report.problems:
        raise typer.Exit(1)
    if execute:
        raise typer.Exit(run(planned, job))


@app.command(epilog="Example: scaler batch runs/first --step 120 --keys")
def batch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option(min=1, help="Counted from 1, as in metrics.jsonl.")],
    keys: Annotated[bool, typer.Option("--keys", help="Only the keys, one a line.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw the views as the workers cut them to this PNG.")] = None,
    sheet_rows: Annotated[int, typer.Option(min=1, help="Samples that --sheet draws at most.")] = 64,
    as_json: Json = False,
) -> None:
    """List the samples of any step of a run, in the order of the global batch; nothing is trained for it."""
    from scaler.batches import contact_sheet, run_batch

    found = run_batch(run_dir, step=step)
    if sheet is not None:
        contact_sheet(found, limit=sheet_rows).save(sheet)
    if as_json:
        print(json.dumps({"step": step, "first_image": found.first_image, "samples": found.rows()}))
    elif keys:
        print("\n".join(found.keys()))
    elif sheet is not None:
        print(f"step {step}: {min(sheet_rows, len(found.batch.ids))} of {len(found.batch.ids)} samples in {sheet}")
    else:
        print("position\tepoch\tkey\tsource")
        for row in found.rows():
            print(row["position"], row["epoch"], row["key"], row["source"], sep="\t")


@evals.command(epilog="Example: scaler eval knn runs/first --train shards/train --val shards/val")
def knn(
    checkpoint: Annotated[str, typer.Argument(help="A run (its newest checkpoint) or one checkpoint; a path or URL.")],
    train_shards: Annotated[Path, typer.Option("--train", help="Labelled shards that hold the neighbours.")],
    val_shards: Annotated[Path, typer.Option("--val", help="Labelled shards to classify.")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.07,
    random_init: Annotated[bool, typer.Option("--random-init", help="The recipe's model before training.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    crop_fraction: Annotated[float, typer.Option(help="Side of the centre crop, of the resized image.")] = 0.875,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1.", show_default="the first GPU, or cpu")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a weighted k-nearest-neighbour vote on the frozen features (of the teacher, where there is one)."""
    from scaler.evals.checkpoints import load_for_evaluation
    from shards.index import ShardIndex

    train_index, val_index = ShardIndex.load(train_shards), ShardIndex.load(val_shards)
    model = load_for_evaluation(checkpoint, device=device, random_init=random_init)
    scores = model.knn(
        train_index,
        val_index,
        k=k,
        temperature=temperature,
        batch_size=batch_size,
        num_workers=num_workers,
        crop_fraction=crop_fraction,
    )
    facts = {
        "checkpoint": str(checkpoint),
        "step": model.step,
        "k": k,
        "temperature": temperature,
        "train_samples": train_index.num_samples,
        "val_samples": val_index.num_samples,
    }
    if as_json:
        print(json.dumps({**facts, **scores}))
        return
    _print_table({**facts, **{name: f"{100 * score:.1f} %" for name, score in scores.items()}})


def _print_table(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    Console().print(table)


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
    _print_table({**facts, "saved by": saved_by, **sizes, "tensors": len(listed)})
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


@benchmarks.command("checkpoint", epilog="Example: scaler bench checkpoint simclr/vits16_in1k --processes 2")
def bench_checkpoint(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a short name.")] = "simclr/vits16_in1k",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, as data.image_size=112.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per process and step, instead of the recipe's.")] = 8,
    minutes: Annotated[float, typer.Option(min=0.01, help="From one checkpoint to the next.")] = 1.0,
    pairs: Annotated[int, typer.Option(min=1, help="Stretches of so many minutes with, and as many without.")] = 4,
    to: Annotated[
        str | None, typer.Option(help="Path or URL for the checkpoints.", show_default="a temporary folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """What saving in the background costs the training, against none, interleaved in one run on random images.

    Processes that torchrun or accelerate have started (`-m scaler.cli bench checkpoint …`) measure together.
    """
    from launch.local import run

    if processes > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        raise typer.Exit(run([*launcher, "-m", "scaler.cli", *sys.argv[1:]], processes=processes))
    from scaler.bench.checkpoint import as_rows, measure

    result = measure(
        recipe,
        overrides=overrides or [],
        batch=batch,
        minutes=minutes,
        pairs=pairs,
        place=to,
        say=lambda text: print(text, file=sys.stderr, flush=True) if os.environ.get("RANK", "0") == "0" else None,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result))
        return
    _print_table(as_rows(result))


@app.command(epilog="Example: scaler demo --dir demo")
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """Real images → shards → SimCLR and DINOv2 on two processes, one killed and resumed → kNN and a picture."""
    from scaler.demo import run_demo

    run_demo(folder)


if __name__ == "__main__":
    main()
