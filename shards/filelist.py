"""A list of image files and their labels, as a CSV or Parquet file, as a source of images."""

from __future__ import annotations

import csv
import os
import stat
from pathlib import Path

import numpy as np

from shards.folder import IMAGE_EXTENSIONS, files_digest, image_extension
from shards.offsets import Skipped
from shards.sources import Files
from shards.storage import printable

_MAX_CLASSES = 10_000_000


def scan_list(source: Path, table: Path, *, labels: bool | None) -> Files:
    """The images that a .csv or .parquet file lists, in its order.

    It has a column `path`, relative to `source`, and may have a column `label`, which is used unless `labels` is False:
    class numbers, or names, which are numbered in sorted order. A file that is missing, lies elsewhere or has no
    image's ending is rejected by name. One that is listed again is ignored, and if with another label rejected, both
    with the reason.

    Raises:
        ValueError: the list cannot be read, has no such column, no rows, or no label in one of them.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that the paths in {table} are relative to")
    listed, texts = _read(table)
    if labels and texts is None:
        raise ValueError(f"{table} has no column label; add one, or leave the labels out (--no-labels)")
    names, numbers = _number(texts, table) if texts is not None and labels is not False else ([], [-1] * len(listed))
    rejected: list[Skipped] = []
    ignored: list[Skipped] = []
    rows: dict[str, tuple[int, int, int]] = {}  # path → label, size, time of the last change
    root = os.path.abspath(source)
    for path, number in zip(listed, numbers, strict=True):
        inside = os.path.relpath(os.path.join(root, path), root)
        try:
            status = os.stat(os.path.join(root, inside))
            why = "not a regular file" if not stat.S_ISREG(status.st_mode) else ""
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            why = f"unreadable: {getattr(error, 'strerror', None) or error}"
        if inside.split("/")[0] == "..":
            why = f"lies outside of {source}"
        elif image_extension(inside) not in IMAGE_EXTENSIONS:
            why = "not an image ending"
        if why:
            rejected.append((printable(path), why))
        elif inside not in rows:
            rows[inside] = number, status.st_size, status.st_mtime_ns
        elif rows[inside][0] == number:
            ignored.append((printable(path), "listed more than once"))
        else:
            rejected.append((printable(path), "listed again with another label; the first one counts"))
    if not rows:
        why = f"; the first, {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise ValueError(f"none of the {len(listed)} files listed in {table} can be used{why}")
    columns = np.array(list(rows.values()), dtype=np.int64)
    return Files(
        root=root,
        paths=list(rows),
        sizes=columns[:, 1].copy(),
        labels=columns[:, 0].copy(),
        class_names=[printable(name) for name in names],
        digest=files_digest([*rows, *names], columns),
        rejected=sorted(rejected),
        ignored=sorted(ignored),
    )


def _read(table: Path) -> tuple[list[str], list[str] | None]:
    """The columns path and label, as texts; None where there is no label."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(table.suffix.lower())
    if reader is None:
        raise ValueError(f"{table} is neither a .csv nor a .parquet file")
    try:
        columns = reader(table)
    except (OSError, csv.Error, UnicodeError) as error:
        raise ValueError(f"cannot read {table}: {getattr(error, 'strerror', None) or error}") from error
    if "path" not in columns:
        raise ValueError(f"{table} has no column path, but {', '.join(columns) or 'none'}; its first row names them")
    if not columns["path"]:
        raise ValueError(f"{table} lists no files")
    return columns["path"], columns.get("label")


def _read_csv(table: Path) -> dict[str, list[str]]:
    with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        columns: dict[str, list[str]] = {name: [] for name in header}
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{table}, line {rows.line_num}: {len(row)} fields where the first row has {len(header)}"
                )
            for name, value in zip(header, row, strict=True):
                columns[name].append(value)
    return columns


def _read_parquet(table: Path) -> dict[str, list[str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"reading {table} takes pyarrow: pip install 'scaler[parquet]' (or give a .csv file)"
        ) from None
    try:
        file = parquet.ParquetFile(table)
        wanted = [name for name in ("path", "label") if name in file.schema_arrow.names]
        columns = file.read(columns=wanted).to_pydict() if wanted else {name: [] for name in file.schema_arrow.names}
    except ArrowException as error:
        raise ValueError(f"cannot read {table}: {' '.join(str(error).split())}") from error
    return {name: ["" if value is None else str(value) for value in values] for name, values in columns.items()}


def _number(texts: list[str], table: Path) -> tuple[list[str], list[int]]:
    """The class names and the class number of each row: labels that are numbers are these, others count their names."""
    if "" in texts:
        raise ValueError(f"{table}, row {texts.index('') + 1}: no label; give all files one, or none (--no-labels)")
    if all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        numbers = [int(text) for text in texts]
        if max(numbers) >= _MAX_CLASSES:
            raise ValueError(
                f"{table}: label {max(numbers)}; class numbers count from 0, to at most {_MAX_CLASSES - 1}"
            )
        return [str(number) for number in range(max(numbers) + 1)], numbers
    names = sorted(set(texts), key=os.fsencode)
    positions = {name: number for number, name in enumerate(names)}
    return names, [positions[text] for text in texts]
