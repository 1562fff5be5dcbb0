"""Keys must be unique, fit a ustar header, and come back from webdataset's own splitter."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shards.keys import KeyMaker, fit_key, plain_key, split_name

PLAIN = {
    "cats/tom.jpg": "cats/tom",
    "cats/tom.v2.final.jpg": "cats/tom_v2_final",
    "v1.2/tom.jpg": "v1.2/tom",
    "a b/c d.PNG": "a b/c d",
    "Katzen/größe 日本.webp": "Katzen/größe 日本",
    ".hidden/a.jpg": "x.hidden/a",
    "a/.hidden.jpg": "a/_hidden",
    "__MACOSX__/a.jpg": "x__MACOSX__/a",
    "a/__init__.jpg": "a/x__init__",
    "a/_.x._.jpg": "a/x__x__",
    "line\nbreak/tab\t.jpg": "line_break/tab_",
    "a/bad\udcff.jpg": "a/bad_",
}


@pytest.mark.parametrize(("path", "key"), PLAIN.items())
def test_plain_key(path: str, key: str) -> None:
    assert plain_key(path) == key


def test_collisions_are_numbered_in_order() -> None:
    make = KeyMaker()
    paths = ["d/a-2.jpg", "d/a.jpg", "d/a.png", "d/a.webp", "e/a.jpg", "d/a.b.jpg", "d/a_b.jpg"]
    assert [make(path) for path in paths] == ["d/a-2", "d/a", "d/a-3", "d/a-4", "e/a", "d/a_b", "d/a_b-2"]


@pytest.mark.parametrize("path", ["n" * 95, "p" * 154 + "/" + "n" * 95, "a/" * 77 + "n" * 95, "ö" * 47])
def test_keys_that_fit_are_left_alone(path: str) -> None:
    assert plain_key(f"{path}.jpeg") == fit_key(path) == path


@pytest.mark.parametrize("path", ["n" * 96, "p" * 156 + "/n", "ö" * 48, "a/" + "日" * 80, "a" * 100 + "/" + "b" * 100])
def test_keys_that_do_not_fit_end_in_a_hash(path: str) -> None:
    short = fit_key(path)
    assert re.search(r"-[0-9a-f]{16}$", short) and len(short.encode()) <= 250
    assert split_name(f"{short}.jpeg".encode()) is not None
    assert fit_key(path[:-1] + "?") != short, "names that differ only in what is cut off must stay apart"


NASTY = st.sampled_from(
    [".", "_", "__", "..", " ", "-2", "é", "日", "\n", "\x7f", "\udcfe", "\\", "😀", "x" * 60, "y" * 90]
)
PART = st.lists(NASTY | st.sampled_from(string.ascii_lowercase[:3]), min_size=1, max_size=6).map("".join)
PATHS = st.lists(
    st.lists(PART, min_size=1, max_size=5).map(lambda parts: "/".join(parts) + ".jpg"), max_size=30, unique=True
)


@settings(max_examples=200, deadline=None)
@given(PATHS)
def test_any_paths(paths: list[str]) -> None:
    make = KeyMaker()
    keys = [make(path) for path in paths]
    assert len(set(keys)) == len(paths)
    for key in keys:
        assert len(key.encode()) <= 250
        assert not re.search(r"[\x00-\x1f\x7f]", key)
        for ending in ("jpg", "cls", "json", "jpeg"):
            name = f"{key}.{ending}"
            assert base_plus_ext(name) == (key, ending)
            assert not re.match(r"__[^/]*__($|/)", name), "webdataset's skip_meta"
            split = split_name(name.encode())
            assert split is not None
            folder, base = split
            assert len(folder) <= 155 and 0 < len(base) <= 100
            assert (folder + b"/" + base if folder else base) == name.encode()
        assert not any(part.startswith(".") or not part for part in key.split("/"))


@settings(deadline=None)
@given(st.lists(st.text("aB9_-. /é\n", min_size=1, max_size=110), max_size=30))
def test_ordinary_paths_take_a_short_way_to_the_same_keys(stems: list[str]) -> None:
    paths = [f"{stem}.jpg" for stem in stems]
    short = KeyMaker()
    keys = [short(path) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.keys._ORDINARY", re.compile("(?!)"))  # matches nothing
        long = KeyMaker()
        assert [long(path) for path in paths] == keys
