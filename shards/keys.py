"""The names of samples inside a shard.

A key is the relative path of an image without its ending, changed only where WebDataset or the tar format would not
give it back:

* WebDataset splits a member's base name at its first dot: dots in the last part become `_`.
* WebDataset skips members below `__name__` folders, and tools hide names with a leading dot: such parts get an `x`
  in front. Control characters and invalid utf-8 become `_`.
* Two sources of the same key (`a.jpg`, `a.png`): the second, in path order, becomes `a-2`, then `a-3`, …
* A POSIX ustar header holds a name of 100 bytes after a folder of 155: keys that do not fit (always above 250 bytes)
  are cut and end in 16 digits of their sha256.
"""

from __future__ import annotations

import hashlib
import os
import re

MAX_KEY = 250
MAX_EXTENSION = 5  # the dot and the longest of our members' endings: jpeg, webp, json
NAME_BYTES, PREFIX_BYTES = 100, 155  # of a ustar header

# Paths whose key is what stands before their ending, as nearly all are: nothing below would change it.
_ORDINARY = re.compile(r"(?:[A-Za-z0-9][\w. -]*/)*[A-Za-z0-9][\w -]*\.[A-Za-z0-9]+", re.ASCII)

_META = re.compile(r"__.*__", re.DOTALL)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffd]")  # control characters, line ends, undecodable bytes


class KeyMaker:
    """Gives every source path of one data set its key; the same paths in the same order give the same keys."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def __call__(self, path: str) -> str:
        """The key of a relative path such as `cats/tom.v2.jpg` (here `cats/tom_v2`), unlike all given before."""
        if len(path) <= NAME_BYTES - MAX_EXTENSION and _ORDINARY.fullmatch(path):
            wanted = key = path[: path.rfind(".")]
        else:
            wanted = plain_key(path)
            key = fit_key(wanted)
        number = 1
        while key in self._used:
            number += 1
            key = fit_key(f"{wanted}-{number}")
        self._used.add(key)
        return key


def plain_key(path: str) -> str:
    """The key of a relative path before collisions and length are looked at."""
    text = os.path.splitext(path)[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    *folders, last = _UNSAFE.sub("_", text).split("/")
    return "/".join(_guard(part) for part in [*folders, last.replace(".", "_")])


def fit_key(key: str) -> str:
    """The key itself if a ustar header can hold it, otherwise a shorter one that ends in a hash of the whole."""
    if split_name(f"{key}{'.' * MAX_EXTENSION}".encode()) is not None and len(key.encode()) <= MAX_KEY:
        return key
    suffix = f"-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder, _, last = key.rpartition("/")
    last = _cut(last, NAME_BYTES - MAX_EXTENSION - len(suffix)) + suffix
    if not folder:
        return last
    # Cutting may leave a part that needs its guard again; the guard adds one byte.
    folder = _cut(folder, MAX_KEY - NAME_BYTES).rstrip("/")
    return "/".join([*map(_guard, folder.split("/")), last])


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """A member's name as ustar's (folder, name) at a slash, or None when it cannot be split to fit."""
    if len(name) <= NAME_BYTES:
        return b"", name
    slash = name.rfind(b"/", 0, PREFIX_BYTES + 1)
    if slash <= 0 or len(name) - slash - 1 > NAME_BYTES:
        return None
    return name[:slash], name[slash + 1 :]


def _guard(part: str) -> str:
    return f"x{part}" if part.startswith(".") or _META.fullmatch(part) else part


def _cut(text: str, num_bytes: int) -> str:
    return text.encode()[:num_bytes].decode("utf-8", "ignore")
