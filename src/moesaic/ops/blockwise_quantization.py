"""Blockwise quantization: float32 values as 8-bit codes, with a scale for each block of a row.

A block is at most ``block`` neighbouring values of the last dim; it ends at the end of a row, so
rows that are cut from a tensor have the codes and scales that they have in it. Its scale is its
largest absolute value. Codes number the 256 values of a dynamic map, ascending: each power of ten
from 1e-7 to 1 has twice as many as the one below (Dettmers 2015, arXiv:1511.04561; blocks:
Dettmers et al. 2022, arXiv:2110.02861, section 2.1). Maps are those of torchao and bitsandbytes.

Letters: R leading dims, N values of a row, K blocks of a row.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.nn.functional import pad

from moesaic.core.shapes import Float, Int, Tensor

DECADES = 7
SMALLEST_NORMAL = 2.0**-126  # of float32: a block of zeros is divided by it


@dataclass(frozen=True, slots=True)
class DynamicMap:
    """The values of codes, the middles between them, and a table that finds codes.

    A float32 value whose upper 16 bits, read as an integer, are k - 32768 has the code
    ``lowest[k]`` or the next one: the middle between these two decides.
    """

    values: "np.ndarray[tuple[int], np.dtype[np.float32]]"
    middles: "np.ndarray[tuple[int], np.dtype[np.float32]]"
    lowest: "np.ndarray[tuple[int], np.dtype[np.uint8]]"


@cache
def dynamic_map(*, signed: bool) -> DynamicMap:
    """Return the map of values from -1 to 1, or from 0 to 1.

    Of NumPy arrays: the first call may be on fake tensors.
    """
    decades = [np.array([0, 1], dtype=np.float32)]
    for decade in range(DECADES):
        edges = _edges(2 ** (decade + (not signed)))
        scale = np.float32(10.0 ** (decade + 1 - DECADES))
        centres = scale * ((edges[:-1] + edges[1:]) / np.float32(2))
        decades += [centres, -centres] if signed else [centres]
    values = np.sort(np.concatenate(decades))
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    upper = np.arange(-(2**15), 2**15, dtype=np.int32) << 16
    ends = np.stack([upper, upper | 0xFFFF]).view(np.float32)
    lowest = np.searchsorted(middles, np.nan_to_num(ends).min(0), side="right").astype(np.uint8)
    return DynamicMap(values, np.append(middles, np.float32(np.inf)), lowest)


def _edges(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Return the ends of ``count`` equal parts of 0.1 to 1, as ``torch.linspace`` rounds them."""
    first, last, places = np.float32(0.1), np.float32(1), np.arange(count + 1)
    step = float((last - first) / np.float32(count))  # products and sums are rounded together
    is_near = places < (count + 1) // 2
    edges = np.where(is_near, float(first) + step * places, float(last) - step * places[::-1])
    return edges.astype(np.float32)


def blocks_per_row(length: int, *, block: int) -> int:
    """Return the number of blocks of a row of so many values."""
    return -(-length // block)


def quantize(
    values: Float[Tensor, "*R N"], *, block: int, signed: bool
) -> tuple[Int[Tensor, "*R N"], Float[Tensor, "*R K"]]:
    """Return the codes (uint8) of the nearest values of the map, and the scales.

    Half-way between two, it is the upper one.
    """
    length = values.shape[-1]
    blocks = _in_blocks(values, block)
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp_min(SMALLEST_NORMAL).unsqueeze(-1)
    find = _codes_by_table if shares.device.type == "cpu" else codes_by_search
    return find(shares, signed=signed).flatten(-2)[..., :length], scales


def dequantize(
    codes: Int[Tensor, "*R N"], scales: Float[Tensor, "*R K"], *, block: int, signed: bool
) -> Float[Tensor, "*R N"]:
    """Return the values of codes, multiplied by their scales."""
    values = _as_tensor(dynamic_map(signed=signed).values, like=codes)
    found = values.index_select(0, codes.flatten().int()).view(codes.shape)
    blocks = _in_blocks(found, block) * scales.unsqueeze(-1)
    return blocks.flatten(-2)[..., : codes.shape[-1]]


def codes_by_search(shares: Float[Tensor, "*N"], *, signed: bool) -> Int[Tensor, "*N"]:
    """Return the codes of values by a binary search: the definition, and fast on a GPU."""
    middles = _as_tensor(dynamic_map(signed=signed).middles, like=shares)
    return torch.bucketize(shares, middles, right=True, out_int32=True).to(torch.uint8)


def _codes_by_table(shares: Float[Tensor, "*N"], *, signed: bool) -> Int[Tensor, "*N"]:
    """Return the same codes by a table: on a CPU in a fiftieth of the time."""
    found = dynamic_map(signed=signed)
    lowest, middles = (_as_tensor(each, like=shares) for each in (found.lowest, found.middles))
    flat = shares.flatten()
    codes = lowest.index_select(0, (flat.view(torch.int32) >> 16) + 2**15)
    codes += flat >= middles.index_select(0, codes.int())
    return codes.view(shares.shape)


def _in_blocks(rows: Float[Tensor, "*R N"], block: int) -> Float[Tensor, "*R K B"]:
    """Return a view in blocks, or a copy where the last block of a row is filled with zeros."""
    length = rows.shape[-1]
    size = max(1, min(block, length))
    count = blocks_per_row(length, block=size)
    missing = count * size - length
    return (pad(rows, (0, missing)) if missing else rows).unflatten(-1, (count, size))


def _as_tensor(array: "np.ndarray[tuple[int], np.dtype[np.generic]]", *, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
