"""Batches that are decoded on a device are those of the workers: samples, boxes, replacements, records; pixels nearly.

A CPU stands in for the GPU: torchvision decodes there by libjpeg, and views are cut by torch's path.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from shards import device_decode
from shards.decode import Seconds, View, decode_into, draw, inspect, plan
from shards.device_decode import DeviceDecoder, why_no_gpu_decoding
from shards.device_resize import cut_with_triton
from shards.encoded import Packing
from shards.index import ShardIndex
from shards.indexing import build_index
from shards.loader import ShardLoader
from shards.order import SampleOrder
from shards.resize import cut
from shards.workers import Batch
from tests.images import encode_image, make_pixels
from tests.shards.views import BIG, encode

CPU = torch.device("cpu")
VIEWS = (View("global", 24, count=2, scale=(0.3, 1.0)), View("local", 12, count=3, scale=(0.05, 0.3)))
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def bogus_tables(data: bytes) -> bytes:
    """A whole JPEG whose first Huffman table has more codes of one bit than there are: no decoder takes it."""
    at = data.index(b"\xff\xc4") + 5
    counts = data[at : at + 16]
    return data[:at] + bytes([sum(counts), *[0] * 15]) + data[at + 16 :]


def some_files() -> dict[str, bytes]:
    """Of each kind some, and what each needs: the name says."""
    files = {}
    for k in range(30):
        pixels = make_pixels(36 + k % 5, 44 - k % 7, seed=k)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[0x0112] = 6
        whole = encode_image(pixels)
        kinds = [
            ("device", whole),
            ("device-grey", encode_image(pixels[..., 0])),
            ("cpu-png", encode(image, "PNG")),
            ("cpu-turned", encode(image, "JPEG", exif=exif)),
            ("cpu-cmyk", encode(image.convert("CMYK"), "JPEG")),
            ("cpu-progressive", encode(image, "JPEG", progressive=True)),
            ("bad-cut", whole[:-100]),
            ("bad-text", b"not a picture"),
            ("bad-tables", bogus_tables(whole)),
            ("device-fine", encode(image, "JPEG", subsampling="4:4:4", quality=95)),
        ]
        name, data = kinds[k % len(kinds)]
        files[f"{k:02}-{name}.jpg"] = data
    return files


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder, files = tmp_path_factory.mktemp("shards"), list(some_files().items())
    for number, part in enumerate((files[:11], files[11:19], files[19:])):
        with tarfile.open(folder / f"a-{number:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k, (name, data) in enumerate(part):
                stem = name.removesuffix(".jpg")
                for member, content in ((name, data), (f"{stem}.cls", str(k % 4).encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    build_index(folder)
    return ShardIndex.load(folder)


def batches(
    index: ShardIndex, *, decode: str, num_workers: int = 0, chunk: int = 1 << 28, stop: int = 60
) -> list[Batch]:
    order = SampleOrder(index.shard_sizes, seed=1, lanes=2, shuffle_window=6)
    size = {"global_batch_size": 10, "micro_batch_size": 10}
    loader = ShardLoader(index, order, views=VIEWS, seed=3, **size, num_workers=num_workers, stop=stop, decode=decode)
    if decode == "cpu":
        return list(loader)
    decoder = DeviceDecoder(CPU, chunk=chunk)
    return [decoder(batch) for batch in loader]


@pytest.fixture(scope="module")
def expected(index: ShardIndex) -> list[Batch]:
    return batches(index, decode="cpu")


def shown(index: ShardIndex, batch: Batch) -> list[str]:
    """The names of what a batch shows, with its replacements."""
    replaced = {record["id"]: record["replacement_id"] for record in batch["rejected"]}
    return [index.entry(replaced.get(id, id)).source for id in batch["ids"].tolist()]


def check_same(index: ShardIndex, found: list[Batch], expected: list[Batch], *, within: int = 1) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("ids", "epochs", "positions", "labels"):
            assert torch.equal(one[name], other[name])
        for name in ("rejected", "global_batch_size", "image_number"):
            assert one[name] == other[name]
        by_cpu = ["cpu" in name for name in shown(index, one)]
        for view in VIEWS:
            ours, theirs = one["views"][view.name], other["views"][view.name]
            assert ours.shape == theirs.shape == (view.count, 10, 3, view.size, view.size)
            assert torch.equal(ours[:, by_cpu], theirs[:, by_cpu])
            assert (ours.int() - theirs.int()).abs().max() <= within
            assert ours.float().std(dim=(0, 2, 3, 4)).min() > 5  # no row is left out


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_device_makes_the_workers_batches(index: ShardIndex, expected: list[Batch], num_workers: int) -> None:
    found = batches(index, decode="gpu", num_workers=num_workers)
    check_same(index, found, expected)
    names = {name for batch in expected for name in shown(index, batch)}
    assert {name[3:-4] for name in names} >= {"device", "device-grey", "cpu-png", "cpu-turned", "cpu-cmyk"}
    reasons = {record["source"][3:-4] for batch in found for record in batch["rejected"]}
    assert reasons == {"bad-cut", "bad-text", "bad-tables"}
    assert all("encoded" not in batch for batch in found)


def test_kernels_make_the_same(index: ShardIndex, expected: list[Batch], monkeypatch) -> None:
    monkeypatch.setattr(device_decode, "cut_on_device", cut_with_triton)
    check_same(index, batches(index, decode="gpu", stop=10), expected[:1])


def test_what_is_told_is_told_once(index: ShardIndex) -> None:
    notes = [note for batch in batches(index, decode="gpu") for note in batch["notes"]]
    assert [note for note in notes if "of the first 10 images are decoded on cpu and cut by torch" in note] == notes[:1]
    assert "by the workers (" in notes[0] and "1 PNG" in notes[0]
    (refusal,) = notes[1:]  # of the tables
    assert refusal.startswith("warning: cpu refused ") and "Bogus Huffman table" in refusal


def test_chunks_of_any_size_make_the_same(index: ShardIndex, expected: list[Batch], monkeypatch) -> None:
    sizes: list[int] = []
    decode = device_decode._decode

    def counted(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        sizes.append(len(files))
        return decode(files, device)

    monkeypatch.setattr(device_decode, "_decode", counted)
    check_same(index, batches(index, decode="gpu", chunk=1), expected)
    assert set(sizes) == {1}
    sizes.clear()
    # A picture of 44 x 40 pixels takes 2 x 5280 bytes, its cuts at most (2 x 24 + 3 x 12) x 44 x 6.
    check_same(index, batches(index, decode="gpu", chunk=70_000), expected)
    assert 2 <= max(sizes) <= 6


def test_what_the_device_refuses_the_cpu_decodes(index: ShardIndex, expected: list[Batch], monkeypatch) -> None:
    """As a GPU would refuse them: those of no colours with an error, and finely sampled ones by another size."""
    decode, seen = device_decode._decode, []

    def picky(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        infos = [inspect(file.numpy().tobytes(), max_pixels=BIG) for file in files]
        seen.extend(info.components for info in infos)
        if any(info.components == 1 for info in infos):
            raise RuntimeError("Failed to decode batch: 4\nat some line")
        return [p[:, 1:] if len(f) > 2000 else p for p, f in zip(decode(files, device), files, strict=True)]

    monkeypatch.setattr(device_decode, "_decode", picky)
    found = batches(index, decode="gpu")
    check_same(index, found, expected)
    assert 1 in seen and 3 in seen
    for batch, other in zip(found, expected, strict=True):  # those bit for bit
        rows = ["grey" in name for name in shown(index, batch)]
        assert all(torch.equal(batch["views"][v.name][:, rows], other["views"][v.name][:, rows]) for v in VIEWS)


def test_a_batch_without_anything_for_the_device(index: ShardIndex, expected: list[Batch], monkeypatch) -> None:
    monkeypatch.setattr("shards.encoded.why_not_on_gpu", lambda data, info: "whim")
    found = batches(index, decode="gpu")
    check_same(index, found, expected, within=0)
    assert ", the others by the workers (10 whim)" in found[0]["notes"][0]


def test_a_damaged_shard_ends_both(index: ShardIndex, tmp_path: Path) -> None:
    """What a disk has changed is proven by its crc32 before anybody decodes it."""
    for path in index.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = ShardIndex.load(tmp_path)
    entry = copy.entry(0)
    data = bytearray(copy.shard_path(0).read_bytes())
    data[entry.offset + entry.size // 2] ^= 1
    copy.shard_path(0).write_bytes(data)
    for decode in ("cpu", "gpu"):
        with pytest.raises(ValueError, match="is damaged: '00-device'"):
            batches(copy, decode=decode)


def test_files_of_a_batch_lie_in_one_piece(index: ShardIndex) -> None:
    order = SampleOrder(index.shard_sizes, seed=1, lanes=2, shuffle_window=6)
    options: dict[str, Any] = {"views": VIEWS, "seed": 3, "global_batch_size": 10, "micro_batch_size": 10, "stop": 10}
    (batch,) = ShardLoader(index, order, **options, num_workers=1, decode="gpu")
    encoded = batch["encoded"]
    assert encoded.data.is_shared() and encoded.data.dtype == torch.uint8
    sizes = [len(encoded.file(i)) for i in range(len(encoded))]
    assert sum(sizes) == len(encoded.data) and min(sizes) > 300
    assert all(bytes(encoded.file(i).numpy()[:2]) == b"\xff\xd8" for i in range(len(encoded)))
    assert sorted([*encoded.rows.tolist(), *encoded.rest.tolist()]) == list(range(10))
    assert batch["views"]["global"].shape[1] == len(encoded.rest)


def test_a_cpu_is_no_gpu_and_an_unknown_word_no_choice(index: ShardIndex) -> None:
    assert why_no_gpu_decoding(CPU) == "there is no CUDA device"
    with pytest.raises(ValueError, match="decode must be cpu or gpu, not 'tpu'"):
        batches(index, decode="tpu")


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpegs_views_are_nearly_libjpegs() -> None:
    """In the mean within 2 grey levels where colours are not subsampled or there are none; 4:2:0 may be replicated."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert why_no_gpu_decoding(device) is None
    views = [View("v", 96, count=4)]
    pixels = [make_pixels(320 + 16 * k + k % 2, 240 + k, seed=k) for k in range(12)]
    files = [
        encode_image(p[..., 0])
        if k % 4 == 3
        else simplejpeg.encode_jpeg(p, quality=92, colorsubsampling=("444", "422", "420")[k % 4])
        for k, p in enumerate(pixels)
    ]
    packing = Packing(views, BIG)
    expected = torch.empty((4, len(files), 3, 96, 96), dtype=torch.uint8)
    for row, data in enumerate(files):
        draws = [draw(views[0], seed=0, epoch=0, sample_id=row)]
        packing.add(row, data, draws=draws, seconds=Seconds())
        picture = simplejpeg.decode_jpeg(data)
        cuts = plan(views[0], inspect(data, max_pixels=BIG), draws[0])
        cut(expected.numpy()[:, row], picture, cuts, interpolation="bicubic")
    rest, encoded = packing.pack(np.arange(len(files)), new=lambda shape: torch.empty(shape, dtype=torch.uint8))
    assert len(encoded) == len(files)
    batch = {"views": rest, "encoded": encoded, "labels": torch.zeros(len(files)), "rejected": []}
    found = DeviceDecoder(device)(batch)
    assert len(found["notes"]) == 1, found["notes"]  # nothing was refused
    difference = (found["views"]["v"].cpu().int() - expected.int()).abs().float()
    means = difference.mean(dim=(0, 2, 3, 4)).tolist()
    print("mean difference by picture:", [round(mean, 2) for mean in means], "largest:", difference.max().item())
    assert all(mean <= (4.0 if k % 4 in (1, 2) else 2.0) for k, mean in enumerate(means))
    workers = torch.empty_like(expected)
    for row, data in enumerate(files):
        draws = [draw(views[0], seed=0, epoch=0, sample_id=row)]
        out = [workers.numpy()[:, row]]
        decode_into(out, data, views=views, draws=draws, max_pixels=BIG, seconds=Seconds())
    assert (found["views"]["v"].cpu().int() - workers.int()).abs().float().mean() <= 4.0
