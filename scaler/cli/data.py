"""Shards: made, indexed, looked into."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from scaler.cli.common import Json, Workers, WrongUse

data = typer.Typer()
_SHOWN = 20  # rejected files that are listed without --json


@data.command(epilog="Example: scaler convert photos s3://bucket/photos --val-fraction 0.1 --resize 512")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images or class folders; or shards: a .tar, a folder or URL of them, {0..9}.tar."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="Folder or URL (s3://…) for the shards and their index.")],
    from_list: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet file with columns path (below SOURCE) and label (number or class name)."),
    ] = None,
    name: Annotated[str, typer.Option(help="Shards are called NAME-000000.tar, …")] = "shard",
    shard_size: Annotated[
        str | None,
        typer.Option(help="Bytes of a shard, as 256MB or 1GiB.", show_default="256MB; small sets in 8 shards"),
    ] = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of the order of files in the shards, and of --val-fraction.")] = 0,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Or in the order of the source.")] = True,
    labels: Annotated[
        bool | None,
        typer.Option("--labels/--no-labels", help="Folders are classes, or not.", show_default="as it looks"),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Part of each class that goes to DESTINATION/val, the others to DESTINATION/train."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Reduce images of a longer short side to this one: they become upright JPEGs without transparency or "
            "colour profile (as training sees them); smaller ones keep their bytes.",
        ),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of the JPEGs of --resize.", show_default="90")] = None,
    json_member: Annotated[
        bool, typer.Option("--json-member", help="Add path, width and height (and a source shard's own) as KEY.json.")
    ] = False,
    decode_check: Annotated[bool, typer.Option("--decode-check", help="Decode every image whole (slow).")] = False,
    as_json: Json = False,
) -> None:
    """Write images as WebDataset shards, shuffled; interrupted and repeated, it goes on.

    Bytes are kept as they are, unless --resize is given. Files that are no readable image are listed with the reason,
    and the exit code is 1.
    """
    from shards.convert import convert as convert_images

    try:
        report = convert_images(
            source,
            destination,
            from_list=from_list,
            name=name,
            shard_size=shard_size,
            workers=workers,
            seed=seed,
            shuffle=shuffle,
            labels=labels,
            val_fraction=val_fraction,
            resize=resize,
            quality=quality,
            json_member=json_member,
            decode_check=decode_check,
            progress=not as_json,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the shards that are missing", file=sys.stderr)
        raise typer.Exit(130) from None
    rejected, ignored = ([list(pair) for pair in pairs] for pairs in (report.rejected, report.ignored))
    if as_json:
        print(json.dumps({**vars(report), "rejected": rejected, "ignored": ignored}))
    else:
        print(
            f"{report.num_samples} images of {len(report.class_names)} classes in {report.num_shards} shards "
            f"({report.num_bytes / 1e6:.1f} MB) in {destination}"
            + (f" ({', '.join(f'{part}: {n}' for part, n in report.splits.items())})" if report.splits else "")
            + (f"; {report.num_skipped_finished} shards were there already" if report.num_skipped_finished else "")
            + (f"; {len(ignored)} files that are no images were left out" if ignored else "")
        )
        _list_rejected(rejected, "files were rejected")
    if rejected:
        raise typer.Exit(1)


@data.command(epilog="Example: scaler index shards/laion --workers 8")
def index(
    destination: Annotated[
        str, typer.Argument(help="Folder or URL that holds the .tar files; their names may be given in braces.")
    ],
    workers: Workers = None,
    image_ext: Annotated[
        list[str] | None,
        typer.Option(
            help="Ending of the images, as left.jpg; may be given again, the first that a sample has counts.",
            show_default="jpg jpeg png webp",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Local folder for the index, where shards lie that cannot be written beside.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Index shards that were made elsewhere (img2dataset, tar, webdataset), so that they can be trained on.

    Every byte is read once. Members that are no part of a sample with an image are listed with the reason.
    """
    from shards.folder import IMAGE_EXTENSIONS
    from shards.indexing import build_index

    shards = build_index(
        destination,
        out=out,
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


@data.command(epilog="Example: scaler verify shards/train --decode")
def verify(
    destination: Annotated[str, typer.Argument(help="Folder or URL of shards with their index.")],
    workers: Workers = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image whole (slow).")] = False,
    as_json: Json = False,
) -> None:
    """Compare shards with their index, byte for byte, and say what to do about each that differs.

    One line a file; the exit code is 1 when there is a problem.
    """
    from shards.verify import verify as verify_shards

    reports = verify_shards(destination, workers=workers, decode=decode, progress=not as_json)
    problems = sum(len(report.problems) for report in reports)
    if as_json:
        print(json.dumps({"problems": problems, "files": [vars(report) for report in reports]}))
    else:
        for report in reports:
            shown = report.problems[:_SHOWN]
            state = (
                "ok" if not shown else f"{len(report.problems)} problems" if len(report.problems) > 1 else "1 problem"
            )
            print(f"{report.name}: {state}, {report.num_samples} images, {report.num_bytes / 1e6:.1f} MB")
            print("".join(f"    {problem}\n" for problem in shown), end="")
            if len(report.problems) > len(shown):
                print(f"    … and {len(report.problems) - len(shown)} more; --json lists them all")
        wrong = sum(bool(report.problems) for report in reports)
        print(f"{wrong} of {len(reports)} files have problems" if wrong else f"all {len(reports)} shards are right")
    if problems:
        raise typer.Exit(1)


def _list_rejected(pairs: list[list[str]], what: str) -> None:
    for path, reason in pairs[:_SHOWN]:
        print(f"{path}: {reason}", file=sys.stderr)
    if len(pairs) > _SHOWN:
        print(f"… and {len(pairs) - _SHOWN} more; --json lists them all", file=sys.stderr)
    if pairs:
        print(f"{len(pairs)} {what}", file=sys.stderr)


@data.command(epilog="Example: scaler batch runs/first --step 120 --keys")
def batch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option(min=1, help="Counted from 1, as in metrics.jsonl.")],
    keys: Annotated[bool, typer.Option("--keys", help="Only the keys, one a line.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw the views as the workers cut them to this PNG.")] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="--sheet: with colours and masks, as the network gets them.")
    ] = False,
    sheet_rows: Annotated[int, typer.Option(min=1, help="Samples that --sheet draws at most.")] = 64,
    as_json: Json = False,
) -> None:
    """List the samples of any step of a run, in the order of the global batch; nothing is trained for it."""
    from scaler.batches import run_batch

    if augmented and sheet is None:
        raise WrongUse("--augmented is for a picture: give --sheet FILE.png too")
    found = run_batch(run_dir, step=step)
    if sheet is not None:
        from scaler.show.views import contact_sheet

        contact_sheet(found, limit=sheet_rows, augmented=augmented).save(sheet)
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
