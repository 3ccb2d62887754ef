"""Joining and leaving a group of ranks, from the environment that ``torchrun`` sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as distributed

from moesaic.core.errors import UserError
from moesaic.dist.world import Alone, Ranks, World

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def join(*, timeout_s: float = 120.0, device: str = "auto") -> Iterator[World]:
    """Give this process its ``World`` and leave it cleanly at the end.

    Under ``torchrun`` the ranks meet in one group; a rank that does not answer within ``timeout_s``
    ends the run with an error instead of hanging it. Outside, the world is ``Alone``. A group that
    exists already is used and left as it is. ``device`` is ``auto``, ``cpu`` or ``cuda``.
    Raises UserError when the environment is half set.
    """
    chosen = _device(device)
    if distributed.is_available() and distributed.is_initialized():
        yield Ranks(chosen)
        return
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Alone(chosen)
        return
    _init(chosen, timeout_s=timeout_s)
    try:
        world = Ranks(chosen)
        yield world
        # without this a quick rank tears its connections down while others still use them
        world.barrier()
    finally:
        distributed.destroy_process_group()


def _init(device: torch.device, *, timeout_s: float) -> None:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment names a rank but not {', '.join(missing)}: start with "
            "`torchrun --nproc-per-node N -m moesaic train ...`, or unset RANK and WORLD_SIZE"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(rank, timeout=timeout)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout
    )


def _store(rank: int, *, timeout: timedelta) -> distributed.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Meet under a name of this attempt.

    After ``torchrun --max-restarts`` the agent's store still holds the addresses of the ranks that
    died; without a prefix per attempt gloo connects to those ("connectFullMesh failed").
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not shared,
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"attempt-{attempt}"
    return distributed.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} was asked for, but torch sees no CUDA device here")
    local, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= seen:
        raise UserError(
            f"rank {local} of this machine needs a GPU of its own, but torch sees {seen}: start "
            f"at most {seen} ranks here, or use the CPU"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
