"""Other projects' formats and loaders, where they are installed, for the benchmarks.

Each peer turns a folder of images (`ImageFolder` layout) into its own format once and then reads raw samples for ever.
Nothing here is imported unless it is measured; what cannot be imported says why.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaler.nn.color import Color
from shards.decode import View
from shards.folder import IMAGE_EXTENSIONS, scan_folder

PEERS = {"webdataset": "webdataset", "litdata": "litdata", "mosaicml-streaming": "streaming", "dali": "nvidia.dali"}


@dataclass(frozen=True)
class Files:
    """The pictures that are measured, as a folder and as our shards, and a folder for other forms."""

    folder: Path
    shards: Path
    scratch: Path

    def paths(self) -> tuple[list[Path], list[int]]:
        """The files in path order, and the class of each (-1: none)."""
        found = scan_folder(self.folder, labels=None)
        return [self.folder / path for path in found.paths], found.labels.tolist()


def why_missing(peer: str) -> str | None:
    """Why a peer cannot be measured, in a few words; None when it can."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _load(peer)
    except ModuleNotFoundError as error:
        return "not installed" if error.name in (PEERS[peer], PEERS[peer].split(".")[0]) else f"needs {error.name}"
    except Exception as error:  # whatever an installation that does not fit this machine raises
        return f"cannot be imported: {type(error).__name__}"
    return None


def _load(peer: str) -> Any:
    """The peer's module, by name: nothing here is a dependency of ours."""
    return importlib.import_module(PEERS[peer])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that the inside prints is seen, not even by its child processes."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        for stream in (1, 2):
            kept = os.dup(stream)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stream)
            os.dup2(nowhere.fileno(), stream)
        yield


# ---------------------------------------------------------------------- raw samples, for ever


def tarfile_samples(files: Files) -> Iterator[bytes]:
    """Python's tarfile over our shards."""
    while True:
        for path in sorted(files.shards.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(IMAGE_EXTENSIONS):
                        file = tar.extractfile(member)
                        assert file is not None
                        yield file.read()


def webdataset_samples(files: Files, shuffled: bool) -> Iterator[bytes]:
    """webdataset over our shards, which are plain WebDataset; shuffled in a buffer of 1,000."""
    urls = [str(path) for path in sorted(files.shards.glob("*.tar"))]
    while True:
        dataset = _load("webdataset").WebDataset(urls, shardshuffle=False, empty_check=False)
        if shuffled:
            dataset = dataset.shuffle(1000)
        for (data,) in dataset.to_tuple(";".join(IMAGE_EXTENSIONS)):
            yield data


def litdata_samples(files: Files, shuffled: bool) -> Iterator[bytes]:
    """litdata over what its `optimize` makes."""
    written = files.scratch / "litdata"
    if not written.exists():
        write_litdata(files, written, workers=1)
    with quiet():
        dataset = _load("litdata").StreamingDataset(str(written), shuffle=shuffled)
    while True:
        for sample in dataset:
            yield sample["image"]


def streaming_samples(files: Files, shuffled: bool) -> Iterator[bytes]:
    """mosaicml-streaming over what its MDSWriter makes."""
    written = files.scratch / "mds"
    if not written.exists():
        write_mds(files, written)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _load("mosaicml-streaming").StreamingDataset(local=str(written), shuffle=shuffled, batch_size=1)
    while True:
        for sample in dataset:
            yield sample["image"]


SAMPLES: dict[str, Callable[[Files, bool], Iterator[bytes]]] = {  # (files, whether shuffled)
    "webdataset": webdataset_samples,
    "litdata": litdata_samples,
    "mosaicml-streaming": streaming_samples,
}


# ---------------------------------------------------------------------- writing


def write_webdataset(files: Files, destination: Path) -> None:
    """webdataset's ShardWriter, jpg + cls."""
    destination.mkdir()
    pattern = f"file:{destination}/s-%06d.tar"
    with quiet(), _load("webdataset").ShardWriter(pattern, maxsize=256e6, verbose=0) as writer:
        for number, (path, label) in enumerate(zip(*files.paths(), strict=True)):
            writer.write({"__key__": f"{number:08d}", path.suffix[1:].lower(): path.read_bytes(), "cls": label})


def write_tarfile(files: Files, destination: Path) -> None:
    """Python's tarfile, jpg + cls."""
    destination.mkdir()
    with tarfile.open(destination / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (path, label) in enumerate(zip(*files.paths(), strict=True)):
            for suffix, data in ((path.suffix.lower(), path.read_bytes()), (".cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{number:08d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_mds(files: Files, destination: Path) -> None:
    """mosaicml-streaming's MDSWriter."""
    columns = {"image": "bytes", "label": "int"}
    with _load("mosaicml-streaming").MDSWriter(out=str(destination), columns=columns, size_limit=256_000_000) as writer:
        for path, label in zip(*files.paths(), strict=True):
            writer.write({"image": path.read_bytes(), "label": label})


def write_litdata(files: Files, destination: Path, *, workers: int) -> None:
    """litdata's `optimize`, with chunks of the size that its documentation takes."""
    inputs = list(zip(*files.paths(), strict=True))
    with quiet():
        _load("litdata").optimize(
            _litdata_sample,
            inputs,
            output_dir=str(destination),
            chunk_bytes="64MB",
            num_workers=workers,
            start_method="fork",
        )


def _litdata_sample(item: tuple[Path, int]) -> dict[str, Any]:
    return {"image": item[0].read_bytes(), "label": item[1]}


# ---------------------------------------------------------------------- DALI


def dali_views(
    files: Files, views: Sequence[View], colors: dict[str, Color] | None, *, batch_size: int
) -> Iterator[int]:
    """DALI on the CPU: one decode for all views, then crop, resize and flip of each, and with `colors` everything but
    solarisation, which it lacks. Yields the images of each batch."""
    dali = _load("dali")
    fn, types = dali.fn, dali.types

    def view_of(image: Any, view: View) -> Any:
        kind = types.INTERP_CUBIC if view.interpolation == "bicubic" else types.INTERP_LINEAR
        out = fn.random_resized_crop(
            image,
            size=view.size,
            random_area=list(view.scale),
            random_aspect_ratio=list(view.ratio),
            interp_type=kind,
            antialias=True,
        )
        mirror = fn.random.coin_flip(probability=view.flip)
        if colors is None:
            return fn.flip(out, horizontal=mirror)
        color = colors[view.name]
        strengths = {"brightness": color.brightness, "contrast": color.contrast, "saturation": color.saturation}
        factors = {k: fn.random.uniform(range=[max(0.0, 1 - v), 1 + v]) for k, v in strengths.items()}
        jittered = fn.random.coin_flip(probability=color.jitter_p)
        for name, factor in factors.items():
            factors[name] = 1 + jittered * (factor - 1)
        factors["saturation"] = factors["saturation"] * (1 - fn.random.coin_flip(probability=color.grayscale_p))
        hue = jittered * fn.random.uniform(range=[-360 * color.hue, 360 * color.hue + 1e-6])
        out = fn.color_twist(out, hue=hue, **factors)
        if fn.random.coin_flip(probability=color.blur_p if color.blur_kernel else 0.0, dtype=types.BOOL):
            sigma = fn.random.uniform(range=list(color.blur_sigma))
            out = fn.gaussian_blur(out, window_size=max(color.blur_kernel, 3), sigma=sigma)
        return fn.crop_mirror_normalize(
            out, mirror=mirror, mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], output_layout="CHW"
        )

    @dali.pipeline_def(
        batch_size=batch_size,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
        enable_conditionals=colors is not None,
    )
    def pipeline() -> Any:
        data, _ = fn.readers.file(file_root=str(files.folder), random_shuffle=False)
        image = fn.decoders.image(data, device="cpu")
        return tuple(view_of(image, view) for view in views for _ in range(view.count))

    with quiet():
        made = pipeline()
        made.build()
    for _ in itertools.count():
        made.run()
        yield batch_size
