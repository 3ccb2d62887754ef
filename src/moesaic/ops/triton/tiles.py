"""Tile sizes of the Triton kernels, by GPU architecture, dtype and rows per expert.

The sizes are data (``tiles.json``). A choice depends on shapes only, never on routing counts, so it
needs no device synchronization and a changed routing recompiles nothing.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import printable
from moesaic.core.file_reader import MIB, FileKind, read_json

TABLE = Path(__file__).with_name("tiles.json")
ROW_TILE_OPS = ("up", "down", "down_dgrad", "up_dgrad")  # these share one schedule of row tiles
WEIGHT_GRADIENT_OPS = ("up_wgrad", "down_wgrad")
REGIMES = {"few": 16.0, "some": 64.0, "many": float("inf")}  # most rows per expert, on average


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes and launch parameters of one matrix product.

    ``group_m`` row tiles are scheduled next to each other, to share weights in the L2 cache;
    ``tma`` reads weights by tensor descriptor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False


TILES_FILE = FileKind(name="table of tiles", max_bytes=MIB)
Tiles = dict[str, Tile]


def regime(*, edges: int, experts: int) -> str:
    """Return ``few``, ``some`` or ``many``: by the average number of rows per expert."""
    return next(name for name, most in REGIMES.items() if edges <= most * experts)


def tiles_for(*, edges: int, experts: int, dtype: torch.dtype, architecture: str) -> Tiles:
    """Return the tile of each product for a shape on a GPU architecture."""
    table = load_table()
    kind = "single" if dtype == torch.float32 else "half"
    name = regime(edges=edges, experts=experts)
    return table.get(architecture, {}).get(kind, {}).get(name) or table["any"][kind][name]


def gpu_architecture(device: torch.device) -> str:
    """Return ``sm90`` for Hopper, ``sm80`` for Ampere and Ada, ``any`` where it is unknown."""
    if device.type != "cuda" or torch.version.hip:
        return "any"
    return f"sm{torch.cuda.get_device_capability(device)[0]}0"


@cache
def load_table(path: Path = TABLE) -> dict[str, dict[str, dict[str, Tiles]]]:
    """Return architecture -> dtype kind -> regime -> operation -> ``Tile``. Raises FileError."""
    try:
        return parse_table(read_json(path, TILES_FILE))
    except (ValueError, AttributeError, KeyError) as error:
        raise TILES_FILE.problem(path, f"not a table of tiles ({printable(str(error))})") from error


def parse_table(raw: dict[str, Any]) -> dict[str, dict[str, dict[str, Tiles]]]:
    """Parse lists of numbers into tiles. Raises ValueError for different ``block_m``."""
    return {
        architecture: {
            kind: {
                name: _parse(f"{architecture} {kind} {name}", ops) for name, ops in regimes.items()
            }
            for kind, regimes in kinds.items()
        }
        for architecture, kinds in raw.items()
    }


def _parse(where: str, ops: dict[str, list[int]]) -> Tiles:
    for op, numbers in ops.items():
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or len(numbers) != 7:
            raise ValueError(f"{where} {op}: expected 7 whole numbers")
    tiles = {op: Tile(*numbers[:6], tma=bool(numbers[6])) for op, numbers in ops.items()}
    if len({tiles[op].block_m for op in ROW_TILE_OPS}) > 1:
        raise ValueError(f"tiles for {where}: {', '.join(ROW_TILE_OPS)} must have the same block_m")
    return tiles


def to_numbers(tile: Tile) -> list[int]:
    """Return a tile as a list of numbers, as in ``tiles.json``."""
    numbers = [
        tile.block_m,
        tile.block_n,
        tile.block_k,
        tile.num_warps,
        tile.num_stages,
        tile.group_m,
    ]
    return [*numbers, int(tile.tma)]
