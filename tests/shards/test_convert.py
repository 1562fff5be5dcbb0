"""`convert`: what comes out is read back by stock webdataset and GNU tar; interruptions, bad input, full disks."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards.convert import ConvertReport, convert
from shards.folder import scan_folder
from shards.index import ShardIndex
from shards.parallel import map_processes
from shards.storage import parse_size
from shards.writer import Options, write_shard
from tests.images import encode_image, make_image_folder, make_pixels

# Source path → key. Every file has contents of its own.
AWKWARD = {
    "ant/plain.jpg": "ant/plain",
    "ant/UPPER.JPG": "ant/UPPER",
    "ant/Mixed.JpEg": "ant/Mixed",
    "ant/two words and  more.jpg": "ant/two words and  more",
    "ant/many.dots.in.it.jpg": "ant/many_dots_in_it",
    "ant/same.jpg": "ant/same",
    "ant/same.png": "ant/same-2",
    "ant/same.webp": "ant/same-3",
    "ant/.leading.jpg": "ant/_leading",
    "ant/__meta__.jpg": "ant/x__meta__",
    "ant/deep/er.v1/x.jpg": "ant/deep/er.v1/x",
    "b.c d/größe 日本 😀.png": "b.c d/größe 日本 😀",
    "b.c d/back\\slash'quote\".jpg": "b.c d/back\\slash'quote\"",
    "b.c d/new\nline.jpg": "b.c d/new_line",
    "__z__/a.webp": "x__z__/a",
    "__z__/" + "n" * 180 + ".jpg": None,  # shortened
    "__z__/" + "/".join(["folder" * 10] * 5) + "/n.jpg": None,
}


def pixels_file(number: int, path: str) -> bytes:
    ending = path.rpartition(".")[2].lower()
    return encode_image(make_pixels(20 + number, 30, seed=number), format=ending.replace("jpg", "jpeg"))


def make_awkward(source: Path) -> dict[str, bytes]:
    contents = {path: pixels_file(number, path) for number, path in enumerate(AWKWARD)}
    for path, data in contents.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    return contents


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "convert.json"}


def tars(folder: Path) -> list[str]:
    return [str(file) for file in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("json_member", [False, True])
def test_awkward_names_come_back(tmp_path: Path, json_member: bool) -> None:
    contents = make_awkward(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "out", shard_size="20KB", workers=2, json_member=json_member)
    classes = ["__z__", "ant", "b.c d"]
    assert (report.num_samples, report.class_names) == (len(AWKWARD), classes)
    assert (report.rejected, report.ignored, report.num_skipped_finished) == ([], [], 0)
    assert report.num_shards == len(tars(tmp_path / "out")) > 1
    assert report.num_bytes == sum(os.path.getsize(file) for file in tars(tmp_path / "out"))

    index = ShardIndex.load(tmp_path / "out")
    entries = {entry.key: entry for entry in map(index.entry, range(index.num_samples))}
    assert {entry.source for entry in entries.values()} == set(contents)
    keys = {entry.source: entry.key for entry in entries.values()}
    assert {path: keys[path] for path, key in AWKWARD.items() if key} == {p: k for p, k in AWKWARD.items() if k}
    assert all(len(key.encode()) <= 250 for key in keys.values())

    read = {}  # stock webdataset
    for sample in webdataset.WebDataset(tars(tmp_path / "out"), shardshuffle=False, empty_check=False):
        entry = entries[sample["__key__"]]
        members = {entry.extension, "cls"} | ({"json"} if json_member else set())
        assert {name for name in sample if not name.startswith("__")} == members
        assert sample[entry.extension] == contents[entry.source]
        assert classes[int(sample["cls"])] == entry.source.partition("/")[0] == classes[entry.label]
        if json_member:
            about = json.loads(sample["json"])
            assert (about["path"], about["height"]) == (entry.source, 30)
            assert about["width"] == 20 + list(AWKWARD).index(entry.source)
        read[entry.source] = entry.extension
    assert read == {path: path.rpartition(".")[2].lower() for path in contents}

    unpacked = tmp_path / "unpacked"  # GNU tar
    unpacked.mkdir()
    for file in tars(tmp_path / "out"):
        done = subprocess.run(["tar", "xf", file, "-C", unpacked], capture_output=True, check=True)
        assert done.stderr == b""
    for entry in entries.values():
        assert (unpacked / f"{entry.key}.{entry.extension}").read_bytes() == contents[entry.source]
        assert classes[int((unpacked / f"{entry.key}.cls").read_text())] == entry.source.partition("/")[0]
    assert sum(file.is_file() for file in unpacked.rglob("*")) == len(contents) * (3 if json_member else 2)

    for file in tars(tmp_path / "out"):  # plain ustar headers, nothing of this machine in them
        with tarfile.open(file) as archive:
            assert archive.pax_headers == {}
            for member in archive:
                assert member.isreg() and not member.pax_headers
                assert (member.mode, member.uid, member.gid, member.uname, member.gname) == (0o644, 0, 0, "", "")


def test_index_finds_the_source_bytes(tmp_path: Path) -> None:
    contents = make_awkward(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", shard_size="10KB", workers=1)
    index = ShardIndex.load(tmp_path / "out")
    for number in range(index.num_samples):
        entry = index.entry(number)
        data = index.shard_path(entry.shard).read_bytes()
        assert data[entry.offset : entry.offset + entry.size] == contents[entry.source]
    for number, name in enumerate(index.shard_names):
        assert name == f"shard-{number:06d}.tar"
        index.check_shard(number, full=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_place_and_time_do_not_change_a_byte(tmp_path: Path, shuffle: bool) -> None:
    make_image_folder(tmp_path / "src", num_images=41, classes=3, format="mixed")
    convert(tmp_path / "src", tmp_path / "one", shard_size="20KB", workers=1, shuffle=shuffle)
    shutil.copytree(tmp_path / "src", tmp_path / "elsewhere", copy_function=shutil.copy)
    for workers in (2, 3):
        convert(tmp_path / "elsewhere", tmp_path / f"{workers}", shard_size="20KB", workers=workers, shuffle=shuffle)
        assert snapshot(tmp_path / f"{workers}") == snapshot(tmp_path / "one")
    index = ShardIndex.load(tmp_path / "one")
    sources = [index.entry(number).source for number in range(41)]
    assert (sources == sorted(sources)) != shuffle


def test_seed_changes_the_order_only(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=40, classes=0)
    orders = []
    for seed in (0, 1):
        convert(tmp_path / "src", tmp_path / f"{seed}", seed=seed, workers=1)
        index = ShardIndex.load(tmp_path / f"{seed}")
        orders.append(index.keys(range(40)))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_shards_have_about_the_size_asked_for(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=200, classes=2)
    report = convert(tmp_path / "src", tmp_path / "out", shard_size=50_000, workers=1, name="train")
    sizes = [os.path.getsize(file) for file in tars(tmp_path / "out")]
    largest = max(ShardIndex.load(tmp_path / "out").entry(number).size for number in range(200)) + 3 * 512
    assert len(sizes) == -(-sum(sizes) // 50_000) == report.num_shards
    assert max(sizes) <= 50_000 + largest + 1024
    assert min(sizes) > 50_000 * 0.8, "equal parts, no small rest"
    assert tars(tmp_path / "out")[1].endswith("/train-000001.tar")


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_a_killed_run_continues(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=300, classes=3, size=24)
    convert(tmp_path / "src", tmp_path / "whole", shard_size=1, workers=2)
    out = tmp_path / "out"
    program = (
        "import sys; from shards.convert import convert; convert(sys.argv[1], sys.argv[2], shard_size=1, workers=2)"
    )
    for wanted in (20, 120):  # killed twice; a shard is one image
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "src"), str(out)])
        wait_for(lambda wanted=wanted: len(list(out.glob("*.offsets"))) >= wanted)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        process.kill()
        process.wait()
        for pid in children.stdout.split():
            wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
        assert not (out / "index.json").exists(), "the run had ended before it was killed"
    finished = {file.with_suffix(".tar") for file in out.glob("*.offsets")}
    times = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in finished}
    (out / "shard-000299.tar.12345.partial").write_bytes(b"left by a power cut")

    report = convert(tmp_path / "src", out, shard_size=1, workers=2)
    assert report.num_skipped_finished == len(finished) >= 120
    assert report.num_samples == report.num_shards == 300
    assert times == {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in finished}
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_finished_run_repeated_touches_nothing(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=10)
    (tmp_path / "src/class_0/bad.jpg").write_bytes(b"text")
    first = convert(tmp_path / "src", tmp_path / "out", shard_size="10KB", workers=1)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = convert(tmp_path / "src", tmp_path / "out", shard_size="10KB", workers=1)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert again.num_skipped_finished == again.num_shards == first.num_shards > 1
    assert again.rejected == first.rejected != []
    Path(tars(tmp_path / "out")[0]).unlink()  # a lost shard is made again
    assert convert(tmp_path / "src", tmp_path / "out", shard_size="10KB", workers=1).num_skipped_finished > 0
    ShardIndex.load(tmp_path / "out").check_shard(0, full=True)


def png_bomb(side: int = 30_000) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_nothing_is_lost_silently(tmp_path: Path) -> None:
    source = tmp_path / "src"
    make_image_folder(source, num_images=6, classes=["a", "b"])
    photo = encode_image(make_pixels(200, 150, seed=5))
    drawing = encode_image(make_pixels(30, 30, seed=6), format="png")
    (source / "a/zero.jpg").write_bytes(b"")
    (source / "a/text.jpg").write_text("I am no picture.")
    (source / "a/bomb.png").write_bytes(png_bomb())
    (source / "a/stub.jpg").write_bytes(photo[:15])
    (source / "a/truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (source / "b/really_a_png.jpg").write_bytes(drawing)
    os.symlink("nowhere", source / "b/broken_link.jpg")
    os.symlink("itself.png", source / "b/itself.png")
    os.symlink("../a/text.jpg", source / "b/link_to_text.jpg")
    os.symlink("../../src", source / "b/up")
    os.mkfifo(source / "b/pipe.jpg")
    (source / "b/folder.jpg").mkdir()
    (source / "b/notes.txt").write_text("notes")
    (source / "b/no_ending").write_text("notes")
    (source / "c").mkdir()

    report = convert(source, tmp_path / "out", workers=2, shard_size="20KB")
    reasons = dict(report.rejected)
    assert sorted(reasons) == [
        "a/bomb.png", "a/stub.jpg", "a/text.jpg", "a/zero.jpg",
        "b/broken_link.jpg", "b/itself.png", "b/link_to_text.jpg", "b/pipe.jpg",
    ]  # fmt: skip
    assert "0 bytes" in reasons["a/zero.jpg"]
    assert "30000 x 30000" in reasons["a/bomb.png"] and "max_pixels" in reasons["a/bomb.png"]
    assert "not a JPEG, PNG or WebP" in reasons["a/text.jpg"] == reasons["b/link_to_text.jpg"]
    assert reasons["b/broken_link.jpg"] == "unreadable: No such file or directory"
    assert reasons["b/pipe.jpg"] == "not a regular file"
    assert report.ignored == [
        ("b/no_ending", "not an image ending"),
        ("b/notes.txt", "not an image ending"),
        ("b/up", "a link to a folder that it lies in"),
        ("c", "a class folder without images"),
    ]
    index = ShardIndex.load(tmp_path / "out")
    assert sorted(index.skipped()) == report.rejected
    entries = {entry.source: entry for entry in map(index.entry, range(index.num_samples))}
    assert report.num_samples == len(entries) == 6 + 2 and index.class_names == ["a", "b", "c"]
    for path in ("a/truncated.jpg", "b/really_a_png.jpg"):
        entry = entries[path]
        data = index.shard_path(entry.shard).read_bytes()[entry.offset : entry.offset + entry.size]
        assert entry.extension == "jpg" and data == (source / path).read_bytes()

    checked = convert(source, tmp_path / "checked", workers=2, shard_size="20KB", decode_check=True)
    assert {path for path, _ in checked.rejected} - set(reasons) == {"a/truncated.jpg"}
    assert checked.num_samples == 7


REPORT = (
    "import sys; from shards.convert import convert; print(repr(convert(sys.argv[1], sys.argv[2], workers=1).rejected))"
)


def test_unreadable_files_and_folders_are_rejected(tmp_path: Path) -> None:
    files = make_image_folder(tmp_path / "src", num_images=6, classes=["a", "b"])
    files[0].chmod(0)
    (tmp_path / "src/b/locked").mkdir(mode=0)
    command = [sys.executable, "-c", REPORT, tmp_path / "src", tmp_path / "out"]
    if os.geteuid() == 0:  # who reads everything, unless told not to
        if shutil.which("setpriv") is None:
            pytest.skip("running as root without setpriv")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if "setpriv" in done.stderr:
        pytest.skip(f"running as root: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == [
        ("a/image_00000.jpg", "unreadable: Permission denied"),
        ("b/locked", "unreadable folder: Permission denied"),
    ]
    assert ShardIndex.load(tmp_path / "out").num_samples == 5


def test_deep_folders(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    for _ in range(1200):
        folder = folder / "d"
        folder.mkdir()
    (folder / "a.jpg").write_bytes(encode_image(make_pixels(9, 9, seed=0)))
    assert convert(tmp_path / "src", tmp_path / "out", workers=1).num_samples == 1
    index = ShardIndex.load(tmp_path / "out")
    assert index.entry(0).source == "d/" * 1200 + "a.jpg" and len(index.entry(0).key) <= 250
    subprocess.run(["rm", "-r", tmp_path / "src"], check=True)  # pytest's own removal is recursive


def test_labels(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "flat", num_images=5, classes=0)
    assert convert(tmp_path / "flat", tmp_path / "1", workers=1).class_names == []
    assert ShardIndex.load(tmp_path / "1").labels(range(5)).tolist() == [-1] * 5

    make_image_folder(tmp_path / "mixed", num_images=6, classes=["b", "a"])
    make_image_folder(tmp_path / "mixed", num_images=2, classes=0)
    with pytest.raises(ValueError, match=r"both itself \(image_0000\d\.jpg, …\) and in sub-folders; say labels=True"):
        convert(tmp_path / "mixed", tmp_path / "2", workers=1)
    with_labels = convert(tmp_path / "mixed", tmp_path / "3", workers=1, labels=True)
    assert (with_labels.num_samples, with_labels.class_names) == (6, ["a", "b"])
    assert with_labels.ignored == [(f"image_0000{i}.jpg", "outside of the class folders") for i in range(2)]
    without = convert(tmp_path / "mixed", tmp_path / "4", workers=1, labels=False)
    assert (without.num_samples, without.class_names, without.ignored) == (8, [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "name 'a/b' may hold"),
        ({"name": ""}, "name '' may hold"),
        ({"shard_size": "huge"}, "'huge' is not a size; write for example 256MB"),
        ({"shard_size": 0}, r"shard_size \(0\)"),
        ({"workers": 0}, "workers is 0; at least 1"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict, message: str) -> None:
    make_image_folder(tmp_path / "src", num_images=2)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "src", tmp_path / "out", **{"workers": 1, **options})


def test_wrong_folders(tmp_path: Path) -> None:
    source = tmp_path / "src"
    with pytest.raises(ValueError, match="src is not a folder"):
        convert(source, tmp_path / "out")
    source.mkdir()
    with pytest.raises(ValueError, match=r"^no images \(jpg, jpeg, png, webp\) in .*src$"):
        convert(source, tmp_path / "out")
    (source / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"^no images .* in .*src; it holds 1 other files$"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "bad.png").write_text("text")
    with pytest.raises(ValueError, match=r"not one of the images in .* can be used; the first, bad\.png: not a JPEG"):
        convert(source, tmp_path / "out")
    make_image_folder(source, num_images=2)
    with pytest.raises(ValueError, match="lies in the source"):
        convert(source, source / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cannot make the folder .*file: File exists$"):
        convert(source, tmp_path / "file", labels=True)


def test_a_destination_of_something_else_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    files = make_image_folder(source, num_images=4)
    convert(source, out, workers=1)
    with pytest.raises(ValueError, match=r"begun with other options \(seed 0 → 1, shuffle True → False\)"):
        convert(source, out, workers=1, seed=1, shuffle=False)
    before = snapshot(out)
    files[0].write_bytes(encode_image(make_pixels(50, 50, seed=77)))
    with pytest.raises(ValueError, match=r"files in .* have been added, removed or changed .*; delete it"):
        convert(source, out, workers=1)
    (out / "convert.json").unlink()
    with pytest.raises(ValueError, match="already holds shards that were made otherwise"):
        convert(source, out, workers=1)
    assert snapshot(out) == before


def test_two_conversions_at_once_are_refused(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=2)
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another conversion is writing to"):
        convert(tmp_path / "src", tmp_path / "out", workers=1)
    os.close(descriptor)
    assert convert(tmp_path / "src", tmp_path / "out", workers=1).num_samples == 2


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_file_that_changes_on_the_way_is_an_error(tmp_path: Path, change: str) -> None:
    (file,) = make_image_folder(tmp_path / "src", num_images=1, classes=0)
    source = scan_folder(tmp_path / "src", labels=None)
    if change == "grown":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        file.unlink()
    with pytest.raises(ValueError, match="has changed since the conversion began"):
        write_shard("s.tar", tmp_path / "s.tar", source=source, numbers=np.arange(1), keys=["k"], options=Options())
    assert not list(tmp_path.glob("s.*")), "no partial file"


FULL_DISK = """
import sys
from shards.convert import convert
try:
    convert(sys.argv[1], sys.argv[2], workers=2, shard_size="40KB")
except ValueError as error:
    print(error)
    sys.exit(7)
"""


def test_full_disk(tmp_path: Path) -> None:
    """On a real file system of 300 KB: the error is one line, no partial file stays, the finished shards do."""
    make_image_folder(tmp_path / "src", num_images=400, classes=2)
    (tmp_path / "disk").mkdir()
    script = (
        'mount -t tmpfs -o size=300k tmpfs "$1/disk" || exit 99; '
        'python="$2"; program="$3"; cd "$4"; "$python" -c "$program" "$1/src" "$1/disk/out"; code=$?; '
        'ls "$1/disk/out" > "$1/listing"; exit $code'
    )
    root = Path(__file__).parents[2]
    command = ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path, sys.executable, FULL_DISK, root]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no mounts in a user namespace here: {done.stderr.strip()}")
    assert done.returncode == 7, done.stderr
    assert done.stdout.count("\n") == 1
    assert "cannot write" in done.stdout and "No space left on device; free some space" in done.stdout
    listing = (tmp_path / "listing").read_text().split()
    assert "shard-000000.offsets" in listing and "index.json" not in listing
    assert not [name for name in listing if name.endswith(".partial")]


def test_a_file_size_limit_is_one_line_too(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=100, classes=2)
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))" + FULL_DISK
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "src", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "File too large; free some space" in done.stdout and done.stdout.count("\n") == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["convert.json"]


def test_empty_shards_are_left_out(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=5, classes=0)
    (tmp_path / "src/image_00002.jpg").write_text("text")
    report = convert(tmp_path / "src", tmp_path / "out", shard_size=1, workers=1)
    assert (report.num_samples, report.num_shards, len(report.rejected)) == (4, 4, 1)
    assert len(tars(tmp_path / "out")) == len(list((tmp_path / "out").glob("*.offsets"))) == 4


def kill_self(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(ValueError, match="a worker process was killed"):
        map_processes(kill_self, range(4), num_tasks=4, workers=2, label=None, total=4, amount=int)


def test_progress_goes_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "src", num_images=5, classes=0)
    report: ConvertReport = convert(tmp_path / "src", tmp_path / "out", shard_size=1, workers=2, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "converting" in err and "5/5" in err and report.num_samples == 5


def test_parse_size() -> None:
    sizes = {"256MB": 256_000_000, "1GiB": 2**30, " 1.5 kb ": 1500, "4096": 4096, "12kib": 12288}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "-1", "1TB2", "MB"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


def test_the_index_lists_what_lies_there(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=30)
    convert(tmp_path / "src", tmp_path / "out", shard_size="10KB", workers=1)
    data = json.loads((tmp_path / "out/index.json").read_text())
    for row in data["shards"]:
        content = (tmp_path / "out" / row["file"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert data["num_samples"] == sum(row["samples"] for row in data["shards"]) == 30
    assert data["class_names"] == ["class_0", "class_1", "class_2"]
