"""Compare what must be the same on every rank, before anything is computed.

With another learning rate or clip norm on one rank a run would go on and train something else; with
another width a collective would fail inside the backend. Equal facts cost two all-reduces of some
bytes, whatever the number of ranks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from moesaic.core.config_text import iter_leaves
from moesaic.core.errors import UserError
from moesaic.core.shapes import Tensor
from moesaic.core.version import __version__
from moesaic.distributed.hang_report import format_ranks
from moesaic.distributed.world import World

MAX_NAMED = 8


def require_same_on_all_ranks(facts: Mapping[str, Any], *, world: World, what: str) -> None:
    """Raise UserError on every rank unless ``facts`` (JSON data) are equal on all. Collective.

    ``what`` names them in the error, which lists each key that differs, with its values and ranks.
    """
    if world.size == 1:
        return
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()
    digest = _as_tensor(hashlib.sha256(text).digest()).long()
    # if the sum over ranks is N times the value of each rank, each rank has the same value
    differs = not torch.equal(world.all_reduce(digest), digest * world.size)
    if not world.any_rank(differs):
        return
    described = [json.loads(other) for other in _gather_bytes(text, world=world)]
    differences = list(_differences(described))
    named = "; ".join(differences[:MAX_NAMED])
    more = f"; and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    raise UserError(
        f"the ranks do not have the same {what}: {named}{more}. Start every rank with the same "
        "command, config files and installation"
    )


def version_facts() -> dict[str, Any]:
    """Return the versions that all ranks of a run must share."""
    return {"version of moesaic": __version__, "version of torch": torch.__version__}


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _gather_bytes(content: bytes, *, world: World) -> list[bytes]:
    """Return the bytes of every rank, in rank order."""
    sizes = [int(size) for size in world.all_gather(torch.tensor([len(content)]))]
    padded = content.ljust(max(sizes), b" ")
    parts = world.all_gather(_as_tensor(padded))
    return [bytes(part.tolist())[:size] for part, size in zip(parts, sizes, strict=True)]


def _differences(described: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield ``optimizer.lr is 0.01 on ranks 0, 2-3 and 0.001 on rank 1`` for each such key."""
    leaves = [
        {path: json.dumps(value, ensure_ascii=False) for path, value in iter_leaves(facts, "")}
        for facts in described
    ]
    for path in dict.fromkeys(path for of_rank in leaves for path in of_rank):
        ranks_of: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(leaves):
            ranks_of.setdefault(of_rank.get(path, "missing"), []).append(rank)
        if len(ranks_of) > 1:
            values = [f"{value} on {format_ranks(ranks)}" for value, ranks in ranks_of.items()]
            yield f"{path} is {' and '.join(values)}"
