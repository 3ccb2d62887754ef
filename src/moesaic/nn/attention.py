"""Attention: tokens look at each other (self) or at the source (cross), in several heads.

``looking`` and ``crew`` are parts: how tokens reach the others of their row, and the ranks that
share the matrices. Letters: B rows, S source length, T tokens, D model dim, H heads,
G key/value heads, d head dim.
"""

import torch
from torch import nn

from moesaic.core.config import Config
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.crew import Crew, Solo
from moesaic.nn.looking import Heads, KeyValue, LookHere, Looking, attend, padded
from moesaic.nn.packing import Packing
from moesaic.nn.position import Rotation


class AttentionConfig(Config):
    """``kv_heads`` < ``heads`` shares keys and values between heads (grouped, 2305.13245).

    ``head_dim`` defaults to ``dim / heads``.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None

    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    def width(self, dim: int) -> int:
        """Channels per head."""
        return self.head_dim or dim // self.heads


class SelfAttention(nn.Module):
    """One product makes queries, keys and values; positions turn the first two."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.heads, config.groups(), config.width(dim)
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.groups) * self.width, bias=bias)
        self.out = nn.Linear(self.heads * self.width, dim, bias=bias)
        self.looking: Looking = LookHere()
        self.crew: Crew = Solo()

    def forward(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T D"]:
        """Attend within each row; ``causal``: a token sees itself and what is before it."""
        x = self.crew.meet(x, packing=packing)
        found = self.look(x, packing=packing, rotation=rotation, causal=causal)
        return self.crew.part(self.out(found), packing=packing)

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]:
        """Attend from the newest tokens to all so far; ``cache`` is written at ``position``."""
        found = self.look_back(
            x, packing=packing, rotation=rotation, cache=cache, position=position
        )
        return self.out(found)

    def look(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T HD"]:
        """What the heads found, side by side, before the last product."""
        return self.looking.own(self._project(x, rotation=rotation), packing=packing, causal=causal)

    def look_back(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T HD"]:
        """The same for the newest tokens (see ``step``)."""
        heads = self._project(x, rotation=rotation)
        new = KeyValue(padded(heads.key, packing), padded(heads.value, packing))
        cache.write(new, position=position)
        query = padded(heads.query, packing)
        places = torch.arange(cache.key.shape[2], device=x.device)
        seen = places <= position[:, None, :, None]
        return packing.pack(attend(query, cache, mask=seen, causal=False))

    def _project(self, x: Float[Tensor, "T D"], *, rotation: Rotation) -> Heads:
        heads, groups = self.heads, self.groups
        both, value = self.qkv(x).unflatten(-1, (-1, self.width)).split([heads + groups, groups], 1)
        query, key = rotation(both).split([heads, groups], 1)
        return Heads(query, key, value)


class CrossAttention(nn.Module):
    """Target tokens look at the encoder's states; no positions are turned."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.heads, config.groups(), config.width(dim)
        self.query = nn.Linear(dim, self.heads * self.width, bias=bias)
        self.kv = nn.Linear(dim, 2 * self.groups * self.width, bias=bias)
        self.out = nn.Linear(self.heads * self.width, dim, bias=bias)
        self.looking: Looking = LookHere()
        self.crew: Crew = Solo()

    def read(self, memory: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue:
        """Keys and values of the source, once per layer and batch."""
        both = self.kv(self.crew.meet(memory, packing=packing)).unflatten(-1, (-1, self.width))
        return self.looking.read(*both.split(self.groups, 1), packing=packing)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        """Attend to ``source`` where ``mask`` is true (None: everywhere)."""
        x = self.crew.meet(x, packing=packing)
        query = self.query(x).unflatten(-1, (-1, self.width))
        found = self.looking.cross(query, packing=packing, source=source, mask=mask)
        return self.crew.part(self.out(found), packing=packing)
