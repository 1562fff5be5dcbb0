"""Where weights come from: timm, a file, a folder of timm's, a run or a checkpoint of ours.

    weights = read_weights("timm", backbone="vit_small_patch14_dinov2")        # what timm has for this name
    weights = read_weights("timm:vit_large_patch14_reg4_dinov2", backbone=…)   # what it has for another
    weights = read_weights("dinov2_vitl14_pretrain.pth", backbone=…)           # or .safetensors, .pt, .bin; a URL too
    weights = read_weights("runs/first", backbone=…)                           # its newest checkpoint, of any strategy
    method.load_weights(read_weights)

Nothing is unpickled: files of torch's go through `torch.load(weights_only=True)`. `scaler.nn.weights` puts them into a
backbone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import Tensor

from scaler.checkpoint import resolve_checkpoint, verify
from scaler.checkpoint.container import DTYPES, Entry, read_header
from scaler.checkpoint.loading import Reader
from scaler.nn.backbones import check_model_name
from scaler.nn.weights import Normalization, Weights
from shards.places import Folder, Location, folder_at, locate

FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")  # endings of files with weights
_DEPTH = 4  # of dictionaries in dictionaries


def read_weights(source: str, *, backbone: str) -> Weights:
    """The weights that `method.weights` names; tensors are read when they are asked for.

    Args:
        source: see the module's docstring.
        backbone: timm's name of the model that will get them.

    Raises:
        ValueError: no such place, nothing in it, a damaged or unsafe file, weights that timm does not have.
        OSError: a place that cannot be read.
    """
    if is_timm(source):
        return _from_timm(source.partition(":")[2] or backbone)
    place = locate(source)
    missing = isinstance(place, Path) and not place.exists()
    if place.name.endswith(FILES) and not missing:
        return _from_file(place)
    if isinstance(place, Path) and not place.is_dir():
        what = f"is a file that does not end in {', '.join(FILES)}" if place.is_file() else "does not exist"
        raise ValueError(f"{place} {what}; give weights as timm, timm:NAME, a file, a run or a checkpoint")
    config = timm_config(place)
    return _from_checkpoint(place) if config is None else _from_timm_folder(place, config, backbone=backbone)


def is_timm(source: str) -> bool:
    """Whether a source means weights that timm fetches."""
    return source == "timm" or source.startswith("timm:")


def timm_config(place: Location) -> dict[str, Any] | None:
    """What a folder of timm's (`timm.models.save_for_hf`) says of its model: `architecture`, `pretrained_cfg`.

    None: it is no such folder.

    Raises:
        ValueError: a config.json that is none of timm's.
    """
    folder = folder_at(place)
    if not folder.exists("config.json"):
        return None
    try:
        config: dict[str, Any] = json.loads(folder.read("config.json"))
        config.setdefault("pretrained_cfg", config)  # as older versions wrote it
        str(config["architecture"]), dict(config["pretrained_cfg"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{place}: config.json is not timm's ({why}); name the file with the weights instead"
        ) from None
    return config


def _from_timm(name: str) -> Weights:
    check_model_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split()).partition(". ")[0][:200]
        raise ValueError(
            f"timm cannot give the weights of {name} ({type(error).__name__}: {why}); without network, fetch them "
            "elsewhere and name the file"
        ) from error
    config = model.pretrained_cfg
    place = f"timm's {config['architecture']}" + (f".{config['tag']}" if config.get("tag") else "")
    return Weights(place, model.state_dict(), normalization=_normalization(config), num_heads=_num_heads(model))


def _from_timm_folder(place: Location, config: dict[str, Any], *, backbone: str) -> Weights:
    architecture = str(config["architecture"]).partition(".")[0]
    names = folder_at(place).sizes()
    preferred = ("model.safetensors", "pytorch_model.bin")
    found = [name for name in (*preferred, *sorted(names)) if name in names and name.endswith(FILES)]
    if not found:
        raise ValueError(f"{place} holds no file with weights ({', '.join(FILES)})")
    if architecture != backbone.partition(".")[0]:
        raise ValueError(
            f"{place} is timm's {architecture}, and the backbone {backbone}: set method.backbone: {architecture}, or "
            f"name the file {place / found[0]} if it is meant for both"
        )
    return Weights(
        str(place),
        _from_file(place / found[0]).tensors,
        normalization=_normalization(config["pretrained_cfg"]),
        num_heads=_heads_by_name({**config.get("model_args", {}), "backbone": architecture}),
    )


def _num_heads(model: Any) -> int | None:
    """Attention heads of a ViT of timm's; None: of no such model."""
    blocks: Any = getattr(model, "blocks", ())
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if len(blocks) else None


def _heads_by_name(settings: Mapping[str, Any]) -> int | None:
    """Attention heads of the model called `backbone`, unless `num_heads` says otherwise."""
    if settings.get("num_heads") is not None or not is_model(settings["backbone"]):
        return settings.get("num_heads")
    with torch.device("meta"):
        return _num_heads(timm.create_model(settings["backbone"]))


def _normalization(config: Mapping[str, Any]) -> Normalization | None:
    mean, std = config.get("mean"), config.get("std")
    return (tuple(mean), tuple(std)) if mean and std else None


def _from_file(place: Location) -> Weights:
    if place.name.endswith(".safetensors"):
        folder = folder_at(place.parent)
        entries = read_header(folder, place.name, size=folder.size(place.name))
        return Weights(str(place), _Lazy({name: partial(_read, folder, place.name, e) for name, e in entries.items()}))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, which many files carry along
            if isinstance(place, Path):
                content = torch.load(place, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(place))
            else:
                file = io.BytesIO(folder_at(place.parent).read(place.name))
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe is None:
            raise ValueError(f"{place} is damaged, or no file of torch's") from None
        raise ValueError(
            f"{place} holds more than tensors ({unsafe[1]}), and loading that could run code; save its state dict "
            "alone where you trust it"
        ) from None
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{place} is damaged, or no file of torch's ({' '.join(str(error).split())[:200]})") from None
    return Weights(str(place), dict(_tensors(content)))


def _tensors(value: Any, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries, with their path as name."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Tensor):
            yield f"{prefix}{key}", inner
        elif depth:
            yield from _tensors(inner, f"{prefix}{key}.", depth - 1)


def _read(folder: Folder, file: str, entry: Entry) -> Tensor:
    buffer = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    folder.read_into(file, entry.start, buffer.numpy().data)
    return buffer.view(entry.dtype).view(entry.shape)


def _from_checkpoint(place: Location) -> Weights:
    location = resolve_checkpoint(place)
    verify(location)
    reader = Reader(location)
    tensors: dict[str, Callable[[], Tensor]] = {
        name.removeprefix("method/"): partial(_assemble, reader, name, entry)
        for name, entry in reader.manifest["tensors"].items()
        if name.startswith("method/")
    }
    method = reader.manifest["recipe"]["method"]
    pixels = ((0.0,) * 3, (1.0,) * 3) if method.get("normalize") is False else None
    return Weights(str(location), _Lazy(tensors), normalization=pixels, num_heads=_heads_by_name(method))


def _assemble(reader: Reader, name: str, entry: dict[str, Any]) -> Tensor:
    parts = [reader.read(span) for span in reader.spans(name, 0, math.prod(entry["shape"]))]
    values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return values.view(DTYPES[entry["dtype"]]).view(entry["shape"])


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)
