"""Stochastic rounding of float32 to bfloat16, by counter-based random bits.

A value is rounded up with a probability that is the distance to the lower neighbour over that of
both neighbours, so its expectation is itself (Gupta et al. 2015, 1502.02551). Four values share a
hash: each uses 16 of its 64 bits.

Letters: N any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.counter_rng import hash_combine, hash_name

_VALUES_PER_HASH = 4
_CHUNK_VALUES = 1 << 22  # random bits in memory at a time: 16 MiB as int32
_DROPPED_BITS = 0xFFFF  # the bits of a float32 that a bfloat16 does not have


@dataclass(frozen=True, slots=True)
class ShardPosition:
    """Where a shard lies in its whole tensor of ``shape``.

    ``spans`` has (start, length) of each run of each dim that the shard contains.
    """

    spans: Sequence[Sequence[tuple[int, int]]]
    shape: Sequence[int]

    @classmethod
    def of_whole(cls, shape: Sequence[int]) -> "ShardPosition":
        """The position of a tensor that is no shard."""
        return cls([((0, size),) for size in shape], shape)

    def rows(self, start: int, stop: int | None) -> "ShardPosition":
        """Return the position of the shard's rows from ``start`` to ``stop`` (None: its last)."""
        if not start and stop is None:
            return self
        runs, done = list[tuple[int, int]](), 0
        for first, length in self.spans[0]:
            low = max(start, done)
            high = done + length if stop is None else min(stop, done + length)
            if low < high:
                runs.append((first + low - done, high - low))
            done += length
        return ShardPosition([runs, *self.spans[1:]], self.shape)


def rounding_key(name: str, *, seed: int, step: int) -> Int[Tensor, ""]:
    """Return the key of a tensor's random bits in a step."""
    return hash_combine(hash_combine(torch.tensor(hash_name(name)), seed), step)


def round_stochastically(
    values: Float[Tensor, "*N"], *, key: Int[Tensor, ""], position: ShardPosition
) -> Float[Tensor, "*N"]:
    """Return float32 values rounded to bfloat16 at random; infinities stay as they are.

    The random bits of a value are a function of ``key`` and its position in the whole tensor.
    """
    *leading, columns = position.spans or [((0, 1),)]
    row = torch.zeros((), dtype=torch.long, device=values.device)
    for runs, size in zip(leading, position.shape, strict=False):
        row = row[..., None] * size + _indices(runs, device=values.device)
    row = hash_combine(row.reshape(-1), key.to(values.device))
    width = sum(length for _, length in columns)
    flat, step = values.reshape(-1, width), max(1, _CHUNK_VALUES // max(1, width))
    rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=values.device)
    for start in range(0, len(flat), step):
        span = slice(start, start + step)
        bits = flat[span].contiguous().view(torch.int32) + _random_bits(row[span], columns)
        rounded[span] = bits.bitwise_and_(~_DROPPED_BITS).view(torch.float32)
    return rounded.view(values.shape)


def _indices(runs: Sequence[tuple[int, int]], *, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(s, s + length, device=device) for s, length in runs])


def _random_bits(row: Tensor, columns: Sequence[tuple[int, int]]) -> Tensor:
    """Return 16 random bits (int32) for each row and column."""
    parts = []
    for start, length in columns:
        first, last = start // _VALUES_PER_HASH, -(-(start + length) // _VALUES_PER_HASH)
        group = torch.arange(first, last, device=row.device)
        bits = hash_combine(row[:, None], group).view(torch.int16)
        offset = start - first * _VALUES_PER_HASH
        parts.append(bits[:, offset : offset + length])
    return torch.cat(parts, 1).to(torch.int32).bitwise_and_(_DROPPED_BITS)
