"""Micro-batches whose JPEGs are decoded and cut by the device that trains on them (`ShardLoader` with `decode` gpu).

    decoder = DeviceDecoder(torch.device("cuda", 0))
    batch = decoder(batch)               # on the current stream; its `views` are whole now, and on the device

The batch is the one that workers make where they decode: the same samples, labels, boxes, mirrored or not, replacements
and records. What differs is rounding. Cutting differs by 1 grey level at most (shards/device_resize.py). Pictures are
decoded in full, not at ½ to ⅛ (shards/decode.py), and nvJPEG computes the transform in its own way and, as far as is
documented, replicates the colours of 4:2:0 where libjpeg interpolates them. The last has not been measured on a GPU;
libjpeg does either. In grey levels of the views against those of workers, mean (and 99.9th percentile of the worst
kind of view), of photo-like JPEGs with 4:2:0 (scaler/bench/images.py):

                                 SimCLR, 2 views          DINOv2, 2+8
    500 x 375, in full           0 (0)                    0 (0)           none of these is decoded at a part of its size
    500 x 375, replicated        1.2 (30)                 0.9 to 1.1 (22)
    1600 x 1200, in full         0.1 (5)                  0.4 to 0.6 (5)
    1600 x 1200, replicated      0.4 (5)                  0.4 to 0.5 (4)

A GPU says nothing of damage within the coded pixels of a file that is whole otherwise, which a CPU would reject: run
`scaler verify --decode` on data of doubtful origin. What the GPU refuses, the CPU decodes, as a worker would, and the
batch says so in `notes`.

Decoding is torchvision's (`torchvision.io.decode_jpeg`; deprecated there since 0.29 in favour of TorchCodec, `_decode`
is the one place that names it). It runs on a stream of its own and waits for that; it knows nothing of the stream whose
memory it is given, so that this one is waited for first. Call it from a thread that may wait. It is worth it on GPUs
that have a JPEG engine (A100, H100, H200 and their like): elsewhere nvJPEG decodes Huffman codes in the host's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from shards.device_resize import cut_on_device, runs_kernels
from shards.encoded import Encoded
from shards.order import Ints
from shards.resize import Pixels
from shards.workers import Batch

_CHUNK = 256 << 20  # bytes of decoded pictures and of what cutting them takes, at a time


def why_no_gpu_decoding(device: torch.device) -> str | None:
    """Why `device` cannot decode JPEGs; None: it has just decoded one."""
    if device.type != "cuda":
        return "there is no CUDA device"
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    try:
        _decode([torch.frombuffer(bytearray(simplejpeg.encode_jpeg(picture)), dtype=torch.uint8)], device)
    except RuntimeError as error:
        return f"torchvision's nvJPEG does not work ({str(error).splitlines()[0]})"
    return None


class DeviceDecoder:
    """Makes whole batches of those that hold an `Encoded`.

    Args:
        device: that decodes; a CPU is taken too, for tests.
        chunk: bytes that pictures and what cutting them takes may have at a time (one picture may have more).
    """

    def __init__(self, device: torch.device, *, chunk: int = _CHUNK) -> None:
        self.device, self.chunk = device, chunk
        self._told_reasons = self._told_refusal = False

    def __call__(self, batch: Mapping[str, Any]) -> Batch:
        """The batch with whole `views` on the device, without `encoded`, and with `notes`: lines for people, each once.

        Raises:
            ValueError: a shard that is missing, or holds nothing that can be decoded.
        """
        encoded: Encoded = batch["encoded"]
        batch = dict(batch)
        size = len(encoded) + len(encoded.rest)
        views = {}
        for name, rest in batch["views"].items():
            views[name] = torch.empty((len(rest), size, *rest.shape[2:]), dtype=torch.uint8, device=self.device)
            self._fill(views[name], rest, encoded.rest)
        refused: list[tuple[int, str]] = []
        for first, past in self._chunks(encoded, views):
            pictures = []
            for i, picture in enumerate(self._pictures(encoded, first, past), start=first):
                if isinstance(picture, str):
                    refused.append((i, picture))
                else:
                    pictures.append((i, picture))
            self._cut(views, encoded, pictures)
        self._redo(batch, views, refused)
        del batch["encoded"]
        return {**batch, "views": views, "notes": list(self._notes(encoded, refused))}

    def _chunks(self, encoded: Encoded, views: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
        """Ranges of files that are decoded at a time: pictures, a copy of them, and their rows at the views' widths."""
        widths = np.concatenate([np.full(len(v), v.shape[-1]) for v in views.values()])  # by copy
        heights = encoded.cuts[..., 2]
        needs = 2 * 3 * encoded.sizes.prod(axis=1) + 2 * 3 * (heights * widths).sum(axis=1)
        first, total = 0, 0
        for i, need in enumerate(needs.tolist()):
            if i > first and total + need > self.chunk:
                yield first, i
                first, total = i, 0
            total += need
        if first < len(encoded):
            yield first, len(encoded)

    def _pictures(self, encoded: Encoded, first: int, past: int) -> list[Tensor | str]:
        """Each file's picture, uint8 [3, h, w] on the device, or why it has none."""
        files = [encoded.file(i) for i in range(first, past)]
        found: list[Tensor | str] = []
        try:
            found += _decode(files, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # all or nothing: who is to blame?
            for file in files:
                try:
                    found += _decode([file], self.device)
                except RuntimeError as error:
                    found.append(str(error).splitlines()[0])
        for i, picture in enumerate(found):
            wanted = (3, *encoded.sizes[first + i].tolist())
            if isinstance(picture, Tensor) and tuple(picture.shape) != wanted:
                found[i] = f"decoded to {tuple(picture.shape)} instead of {wanted}"
        return found

    def _cut(self, views: Mapping[str, Tensor], encoded: Encoded, pictures: Sequence[tuple[int, Tensor]]) -> None:
        if not pictures:
            return
        which = [i for i, _ in pictures]
        start = 0
        for name, out in views.items():
            cut_on_device(
                out,
                [picture for _, picture in pictures],
                encoded.cuts[which, start : start + len(out)],
                rows=encoded.rows[which].tolist(),
                interpolation=encoded.interpolations[name],
            )
            start += len(out)

    def _redo(self, batch: Batch, views: Mapping[str, Tensor], refused: Sequence[tuple[int, str]]) -> None:
        """Have the CPU decode what the device did not."""
        if not refused:
            return
        encoded: Encoded = batch["encoded"]
        assert encoded.source is not None, "a batch of the loader"
        batch["labels"], batch["rejected"] = batch["labels"].clone(), list(batch["rejected"])
        rows = encoded.rows[[i for i, _ in refused]]
        made = {name: torch.empty((len(v), len(rows), *v.shape[2:]), dtype=torch.uint8) for name, v in views.items()}
        for k, row in enumerate(rows.tolist()):
            out: list[Pixels] = [pixels.numpy()[:, k] for pixels in made.values()]
            encoded.source.redo(batch, row, out)
        for name, pixels in made.items():
            self._fill(views[name], pixels, rows)

    def _fill(self, view: Tensor, pixels: Tensor, rows: Ints) -> None:
        """Put pixels of the host, uint8 [count, rows, 3, size, size], into rows of a view."""
        if len(rows):
            view.index_copy_(1, self._sent(torch.from_numpy(rows)), self._sent(pixels))

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _notes(self, encoded: Encoded, refused: Sequence[tuple[int, str]]) -> Iterator[str]:
        if not self._told_reasons:
            self._told_reasons = True
            size = len(encoded) + len(encoded.rest)
            others = ", ".join(f"{count} {reason}" for reason, count in sorted(encoded.reasons.items()))
            yield (
                f"data.decode=gpu: {len(encoded)} of the first {size} images are decoded on {self.device} and cut by "
                + ("kernels" if runs_kernels(self.device) else "torch, since there is no Triton for it")
                + f", the others by the workers ({others})" * bool(others)
            )
        if refused and not self._told_refusal:
            self._told_refusal = True
            yield (
                f"warning: {self.device} refused {len(refused)} of {len(encoded)} JPEGs of a batch ({refused[0][1]}); "
                "what it refuses the CPU decodes, in the training process"
            )


def _decode(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The pictures of JPEG files (uint8 [bytes], on the CPU): uint8 [3, h, w] each, on the device.

    Raises:
        RuntimeError: one of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # torchvision writes from another stream into memory that this one may still be reading.
        torch.cuda.current_stream(device).synchronize()
    decoded: list[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)
    return decoded
