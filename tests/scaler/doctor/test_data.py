"""Shards that are missing, cut off, damaged or not ours to read are found, and named with what mends them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scaler.doctor import data
from scaler.doctor.examine import _fed
from scaler.doctor.finding import Finding
from shards.convert import convert
from shards.index import ShardIndex
from tests.images import make_image_folder


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Path]:
    """Ninety pictures in several shards, in a folder that everybody may enter."""
    make_image_folder(tmp_path / "images", num_images=90)
    convert(tmp_path / "images", tmp_path / "shards", shard_size="60KB", workers=1)
    yield tmp_path / "shards"
    (tmp_path / "shards").chmod(0o755)


def look(shards: Path, **options: Any) -> list[Finding]:
    asked = {"shards": str(shards), "views": [], "cache_dir": None, "cores": 4, "processes": 1, "fed": None}
    asked |= {"elsewhere": False, "decode": "cpu"}
    return list(data.check({**asked, **options}))


def test_rates_of_good_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DECODE_SECONDS", 0.2)
    there, reading, decoding = look(shards, views=[{"name": "a", "size": 32, "scale": [0.5, 1.0]}])
    assert [finding.level for finding in (there, reading, decoding)] == ["ok"] * 3
    assert there.facts["samples"] == 90 and reading.facts["bytes_per_second"] > 1e6
    rate = decoding.facts["images_per_cpu_second"]
    assert rate > 10 and f": 3 workers on 4 cores deliver {3 * rate:.0f}/s" in decoding.found


def test_cores_for_what_the_step_wants(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DECODE_SECONDS", 0.1)
    views = [{"name": "a", "size": 32, "scale": [0.5, 1.0]}]
    *_, slow = look(shards, views=views, fed={"wanted": 1.0, "gpu_decoding_pays": False})
    assert slow.level == "ok" and slow.found.endswith("; the step wants 1/s of each process: 1 worker, 2 cores")
    for pays, fix in ((True, "set data.decode=gpu, which pays by scaler bench feed, or store"), (False, "store small")):
        *_, fast = look(shards, views=views, processes=2, fed={"wanted": 1e6, "gpu_decoding_pays": pays})
        needed = -(-1.1e6 // fast.facts["images_per_cpu_second"])
        assert fast.facts["workers_needed"] == needed and f"{needed + 1:.0f} cores" in fast.found
        assert fast.level == "warning" and fast.fix.startswith(fix)
        assert "2 workers on 4 cores deliver" in fast.found


def test_decoding_on_a_gpu_is_tried(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DECODE_SECONDS", 0.1)
    *_, gpu, rest = look(shards, decode="gpu", fed={"wanted": 1e6, "gpu_decoding_pays": True})
    assert rest.level == "ok" and "workers_needed" not in rest.facts, "what workers decode is not all"
    if not torch.cuda.is_available():
        assert (gpu.level, gpu.fix) == ("error", "data.decode=cpu")
        assert gpu.found == "data.decode=gpu, but there is no CUDA device"


def test_what_bench_feed_wrote_is_read(tmp_path: Path) -> None:
    file = tmp_path / "feed.json"
    file.write_text(json.dumps({"advice": {"wanted": 900.5, "gpu_decoding_pays": True, "cores": {"cpu": 3}}}))
    assert _fed(file) == {"wanted": 900.5, "gpu_decoding_pays": True}
    for text in ("{}", "[]", "no JSON", '{"advice": {"wanted": 1}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"is not what `scaler bench feed RECIPE --out "):
            _fed(file)


def test_faults_and_their_mending(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DECODE_SECONDS", 0.2)
    index, (first, *_) = shards / "index.json", sorted(shards.glob("*.tar"))
    content, whole, sample = index.read_bytes(), first.read_bytes(), ShardIndex.load(shards).entry(0)

    def error() -> Finding:
        *_, finding = look(shards)
        assert finding.level == "error" and finding.check in ("shards", "reading")
        return finding

    index.unlink()
    assert "holds no index.json" in error().found and error().fix == f"scaler index {shards}"
    index.write_text("{")
    assert "is damaged" in error().found and error().fix == f"scaler index {shards}"
    index.write_bytes(content)
    first.write_bytes(whole[:-512])
    assert f"shard {first} was cut off" in error().found and "copy it again" in error().fix
    first.unlink()
    assert f"shard {first} is missing" in error().found
    middle = sample.offset + sample.size // 2
    first.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    assert error().fix == f"scaler verify {shards} tells all"
    nowhere = look(tmp_path / "nowhere")
    assert nowhere[0].found.endswith("nowhere is no folder") and nowhere[0].fix.startswith("scaler convert IMAGES ")
    assert [finding.level for finding in look(tmp_path / "nowhere", elsewhere=True)] == ["ok"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_folder_that_another_user_may_not_read(shards: Path, tmp_path: Path) -> None:
    for folder in [*tmp_path.parents, tmp_path]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)  # the way there is open, only the folder itself is not
    shards.chmod(0o700)
    assert look(shards)[0].level == "ok"  # root may
    (finding,) = _as_nobody(shards)
    assert (finding.level, finding.found) == (
        "error",
        f"nobody may not read {shards} ({shards} belongs to root, mode 700)",
    )
    assert finding.fix == f"chmod -R a+rX {shards}, as who owns it"
    shards.chmod(0o755)
    for path in shards.glob("*.tar"):
        path.chmod(0o600)
    (finding,) = _as_nobody(shards)
    assert finding.found.startswith("cannot read shard ") and finding.fix == f"chmod a+r {shards}/*"


def _as_nobody(shards: Path) -> list[Finding]:
    """Look as a user without rights, in a process of its own."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(write, json.dumps([vars(finding) for finding in look(shards)]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return [Finding(**values) for values in json.loads(found)]
