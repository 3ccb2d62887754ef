"""Random state: the torch generators of every rank as tensors, for checkpoints.

Training code of this package does not draw from them: dropout, noise and random token selection are
counter-based functions of the token (``ops/counter_rng.py``), data is derived from the seed, and
weights are initialized before the streams differ by rank. User-defined modules may draw, and
resume exactly.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import World


def seed_rank(seed: int, *, world: World, step: int = 0) -> None:
    """Seed each rank's generators differently."""
    mixed = torch.Generator().manual_seed((seed * 1_000_003 + step * 8191 + world.rank) % 2**63)
    torch.manual_seed(int(torch.randint(2**62, (), generator=mixed)))


def random_state(world: World) -> dict[str, Tensor]:
    """Return the generator states of all ranks as uint8 tensors. Collective."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return {
        f"{rank}/{device}": part
        for device, state in states.items()
        for rank, part in enumerate(world.all_gather(state))
    }


def restore_random_state(
    tensors: Mapping[str, Tensor], *, world: World, seed: int, step: int
) -> None:
    """Restore each rank's generators, or seed new ones if the number of ranks has changed."""
    saved = {key.partition("/")[0] for key in tensors}
    if len(saved) != world.size:
        seed_rank(seed, world=world, step=step)
        return
    torch.set_rng_state(tensors[f"{world.rank}/cpu"])
    key = f"{world.rank}/cuda"
    if world.device.type == "cuda" and key in tensors:
        torch.cuda.set_rng_state(tensors[key], world.device)


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Context that restores the generators at its end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
