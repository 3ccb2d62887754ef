"""Chunk sizes: how much of an intermediate result exists at a time, by kind of device.

A CPU computes fastest what stays in its cache; an accelerator, what is large.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Of a chunk: bytes of ``logits``, bytes of ``float32`` values, and ``activations`` of experts.

    The last are pre-activations, in elements.
    """

    logits: int
    float32: int
    activations: int


# A chunk of M tokens takes 6 M v D FLOPs, and moves 8 v D bytes of the float32 gradient of the
# table: 0.75 M FLOPs per byte. A CPU does 5 to 10 in the time of a byte, a GPU 200 to 300; bytes
# allow 100 tokens of 163,840 words on a CPU (float32), and 820 on a GPU (bfloat16).
CPU_CHUNKS = ChunkSizes(logits=1 << 26, float32=1 << 21, activations=1 << 18)
ACCELERATOR_CHUNKS = ChunkSizes(logits=1 << 28, float32=1 << 25, activations=1 << 62)


_used: ContextVar[ChunkSizes | None] = ContextVar("chunk sizes", default=None)


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """Return the sizes of a device, or those of ``with use_chunk_sizes(...)``."""
    return _used.get() or (CPU_CHUNKS if device.type == "cpu" else ACCELERATOR_CHUNKS)


@contextmanager
def use_chunk_sizes(sizes: ChunkSizes) -> Iterator[None]:
    """Use these sizes on every device: a simulated rank is on the CPU, whatever it stands for."""
    token = _used.set(sizes)
    try:
        yield
    finally:
        _used.reset(token)
