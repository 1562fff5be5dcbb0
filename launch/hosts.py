"""The machines of a job: DeepSpeed's hostfile, which every launcher over ssh here reads.

# name under which ssh and the other machines reach it, and its processes (GPUs)
node-1 slots=8
node-2 slots=8
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from launch.job import Host

_LINE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)\s+slots=(?P<slots>[0-9]+)")


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile, in its order.

    Raises:
        ValueError: a line that is none, a host given twice, or no host at all; names the line and the rule.
    """
    found: dict[str, Host] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match["slots"]) == 0:
            raise ValueError(f"{path}, line {number}: {text!r} is not `NAME slots=N`, N from 1, as in `node-1 slots=8`")
        if match["name"] in found:
            raise ValueError(f"{path}, line {number}: {match['name']} is there already; give each host one line")
        found[match["name"]] = Host(match["name"], int(match["slots"]))
    if not found:
        raise ValueError(f"{path} names no host; write a line as `node-1 slots=8` for each")
    return tuple(found.values())


def choose_hosts(hosts: Sequence[Host], *, nodes: int | None = None, processes: int | None = None) -> tuple[Host, ...]:
    """The first `nodes` hosts (None: all) with `processes` slots used on each (None: all slots).

    Raises:
        ValueError: there are not so many hosts or slots, or hosts differ in slots (ranks are laid out evenly).
    """
    if nodes is not None and nodes > len(hosts):
        raise ValueError(f"{nodes} nodes, but the hostfile names {len(hosts)}; add hosts or lower --nodes")
    chosen = tuple(hosts[:nodes])
    fewest, most = (pick(chosen, key=lambda host: host.slots) for pick in (min, max))
    if processes is None and fewest.slots != most.slots:
        raise ValueError(
            f"{fewest.name} has {fewest.slots} slots and {most.name} {most.slots}, but every host runs the same number "
            f"of processes; add --processes {fewest.slots}"
        )
    if processes is not None and processes > fewest.slots:
        raise ValueError(f"{processes} processes, but {fewest.name} has {fewest.slots} slots; lower --processes")
    return tuple(Host(host.name, processes or host.slots) for host in chosen)
