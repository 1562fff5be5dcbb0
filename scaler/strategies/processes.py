"""How training processes find each other: their place, the store in which they meet, their group and device.

`accelerate launch`, `deepspeed`, torchrun, srun and a bare `python -m` all end here.

    meeting = meet()                                      # everyone whom the launcher has started
    world, device = join(meeting, ranks=meeting.size)     # those who train
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from scaler.collectives import World

_POLL = 0.02  # seconds
_FOREVER = datetime.timedelta(days=30)  # the caller's watch decides what is too long
_ENDED = "ended"


@dataclass(frozen=True)
class Meeting:
    """This process among all that the launcher started together.

    Attributes:
        rank, size: as the launcher counts.
        store: where they can leave each other words; of this start alone, whatever earlier ones have left there. None
            in a process that had joined a group before.
    """

    rank: int
    size: int
    store: Store | None


def meet(*, say: Callable[[str], None] = lambda text: None) -> Meeting:
    """Find the other processes that the launcher's environment tells of (none without a launcher).

    Args:
        say: told what this process is waiting for.

    Raises:
        ValueError: the launcher's environment is incomplete, or nobody answers at its address.
    """
    if dist.is_initialized():
        return Meeting(dist.get_rank(), dist.get_world_size(), None)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Meeting(0, 1, dist.HashStore())  # type: ignore[attr-defined]
    store = _connect(rank, size, say=say)
    return Meeting(rank, size, dist.PrefixStore(_agree_on_session(store, rank, size, say=say), store))  # type: ignore[attr-defined]


def ranks_per_node(world_size: int) -> int:
    """Processes of this run on this machine, by the launcher's word; without one all of them."""
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))  # torchrun's, DeepSpeed's name
    return int(local)


def join(meeting: Meeting, *, ranks: int, timeout_minutes: float = 60) -> tuple[World, torch.device]:
    """Make the process group of the first `ranks` of those who met; this process must be one of them.

    A group of one is real too, so that FSDP2 runs on a single device. A process that has joined a group already stays
    in it.

    Returns:
        The world and this process's device.

    Raises:
        ValueError: more processes than GPUs on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start at most one process per GPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if meeting.store is not None:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        meeting.store.set_timeout(timeout)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=meeting.store, rank=meeting.rank, world_size=ranks, timeout=timeout)
    return World.current(), device


def dismiss(meeting: Meeting, *, ranks: int, reason: str) -> None:
    """Tell the processes beyond `ranks`, which wait in `wait_for_end`, why the run has ended."""
    if meeting.store is None or meeting.rank != 0:
        return
    meeting.store.set(_ENDED, reason)
    deadline = time.monotonic() + 5  # the store may live in this very process
    for rank in range(ranks, meeting.size):
        while not meeting.store.check([f"{_ENDED}/{rank}"]) and time.monotonic() < deadline:
            time.sleep(_POLL)


def wait_for_end(meeting: Meeting, *, tick: Callable[[], None]) -> str:
    """Idle until the others end; `tick` is called every second. Returns why they ended."""
    assert meeting.store is not None
    while not meeting.store.check([_ENDED]):
        tick()
        time.sleep(1)
    meeting.store.set(f"{_ENDED}/{meeting.rank}", "")
    return str(meeting.store.get(_ENDED).decode())


def _connect(rank: int, size: int, *, say: Callable[[str], None]) -> Store:
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun or accelerate")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if port == 0:
        raise ValueError("MASTER_PORT is 0, at which nobody can meet; give torchrun --standalone or a --master-port")
    say(f"waiting for the store at {address}:{port}")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=not agent_store and rank == 0, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no rendezvous store at MASTER_ADDR:MASTER_PORT {address}:{port}: {reason}") from None
    store.set_timeout(_FOREVER)
    return store


def _agree_on_session(store: Store, rank: int, size: int, *, say: Callable[[str], None]) -> str:
    """A name that this start of the processes has for itself, agreed on by a handshake.

    The launcher's store outlives the processes, and with it the addresses of the dead, which gloo would try. Restart
    counts do not tell starts apart: an agent that restarts because another machine's workers failed does not count.
    So rank 0 draws a name and hands it to whoever shows a fresh nonce, until one such process of every rank has
    confirmed; what the dead have left is answered and never confirmed.
    """
    if rank:
        nonce = uuid.uuid4().hex
        store.set(f"hello/{rank}", nonce)
        say("waiting for rank 0")
        session = store.get(f"session/{rank}/{nonce}").decode()
        store.set(f"{session}/here/{rank}", "")
        return str(session)
    session, missing = uuid.uuid4().hex, list(range(1, size))
    while missing:
        say(f"waiting for rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))} of {size}")
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"session/{other}/{store.get(f'hello/{other}').decode()}", session)
        time.sleep(_POLL)
        missing = [other for other in missing if not store.check([f"{session}/here/{other}"])]
    return session
