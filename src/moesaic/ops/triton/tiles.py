"""Tiles: how large a piece of a product one program computes, by card, dtype, rows per expert.

The numbers are data (``tiles.json``). A choice depends on shapes alone, never on counts, so that
nothing waits for the device and a changed routing compiles nothing.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moesaic.core.files import read_json

TABLE = Path(__file__).with_name("tiles.json")
ROW_TILE_OPS = ("up", "down", "down_back", "up_back")  # these share the schedule of row tiles
WEIGHT_GRADIENT_OPS = ("up_outer", "down_outer")
REGIMES = {"few": 16.0, "some": 64.0, "many": float("inf")}  # most rows per expert, on average


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` x ``columns`` of the result, ``depth`` of the sum at a time; then how to run it.

    ``group`` row tiles run beside each other for the L2 cache; ``tma`` reads banks by descriptor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False


Tiles = dict[str, Tile]


def regime(*, edges: int, experts: int) -> str:
    """Return ``few``, ``some`` or ``many``: how many rows an expert has on average."""
    return next(name for name, most in REGIMES.items() if edges <= most * experts)


def tiles_for(*, edges: int, experts: int, dtype: torch.dtype, architecture: str) -> Tiles:
    """Return the tile of each product for a shape on a card (``gpu_architecture``)."""
    table = load_table()
    kind = "single" if dtype == torch.float32 else "half"
    name = regime(edges=edges, experts=experts)
    return table.get(architecture, {}).get(kind, {}).get(name) or table["any"][kind][name]


def gpu_architecture(device: torch.device) -> str:
    """Return ``sm90`` for a Hopper, ``sm80`` for any Ampere or Ada, ``any`` where it is unknown."""
    if device.type != "cuda" or torch.version.hip:
        return "any"
    return f"sm{torch.cuda.get_device_capability(device)[0]}0"


@cache
def load_table(path: Path = TABLE) -> dict[str, dict[str, dict[str, Tiles]]]:
    """Return card -> dtype kind -> regime -> product -> ``Tile``."""
    return parse_table(read_json(path))


def parse_table(raw: dict[str, Any]) -> dict[str, dict[str, dict[str, Tiles]]]:
    """Turn lists of numbers into tiles. Raises ValueError where products disagree on row tiles."""
    return {
        card: {
            kind: {name: _parse(f"{card} {kind} {name}", ops) for name, ops in regimes.items()}
            for kind, regimes in kinds.items()
        }
        for card, kinds in raw.items()
    }


def _parse(where: str, ops: dict[str, list[int]]) -> Tiles:
    tiles = {op: Tile(*numbers[:6], tma=bool(numbers[6])) for op, numbers in ops.items()}
    if len({tiles[op].block_m for op in ROW_TILE_OPS}) > 1:
        raise ValueError(f"tiles for {where}: {', '.join(ROW_TILE_OPS)} must have the same rows")
    return tiles


def to_numbers(tile: Tile) -> list[int]:
    """Return a tile as it stands in ``tiles.json``."""
    numbers = [
        tile.block_m,
        tile.block_n,
        tile.block_k,
        tile.num_warps,
        tile.num_stages,
        tile.group_m,
    ]
    return [*numbers, int(tile.tma)]
