"""Attention: tokens look at each other (self) or at the source (cross), in several heads.

Letters: B rows, S source length, L target length, T tokens, D model dim, H heads,
G key/value heads, d head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.config import Config
from moesaic.core.shapes import Bool, Float, Int, Tensor
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


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Keys and values of some tokens, ready to be looked at."""

    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]

    def select(self, rows: Int[Tensor, "R"]) -> "KeyValue":
        """Take some batch rows, in any order and number."""
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))

    def fit(self, length: int) -> "KeyValue":
        """Return room for at least ``length`` tokens (zeros), doubling when it grows."""
        have = self.key.shape[2]
        if have >= length:
            return self
        extra = (0, 0, 0, max(length, 2 * have) - have)
        return KeyValue(F.pad(self.key, extra), F.pad(self.value, extra))

    def write(self, new: "KeyValue", *, position: Int[Tensor, "B n"]) -> None:
        """Store new keys and values at each row's positions, in place."""
        row = torch.arange(position.shape[0], device=position.device)[:, None]
        self.key.transpose(1, 2)[row, position] = new.key.transpose(1, 2)
        self.value.transpose(1, 2)[row, position] = new.value.transpose(1, 2)


class SelfAttention(nn.Module):
    """One product makes queries, keys and values; positions turn the first two."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.heads, config.groups(), config.width(dim)
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.groups) * self.width, bias=bias)
        self.out = nn.Linear(self.heads * self.width, dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T D"]:
        """Attend within each row; ``causal``: a token sees itself and what is before it."""
        return self.out(self.look(x, packing=packing, rotation=rotation, causal=causal))

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
        """What the heads found, side by side, before the last product.

        Causal attention needs no mask: padding is on the right, where no real token looks.
        """
        query, new = self._project(x, packing=packing, rotation=rotation)
        mask = None if causal else packing.key_mask
        return packing.pack(attend(query, new, mask=mask, causal=causal))

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
        query, new = self._project(x, packing=packing, rotation=rotation)
        cache.write(new, position=position)
        places = torch.arange(cache.key.shape[2], device=x.device)
        seen = places <= position[:, None, :, None]
        return packing.pack(attend(query, cache, mask=seen, causal=False))

    def _project(
        self, x: Tensor, *, packing: Packing, rotation: Rotation
    ) -> tuple[Tensor, KeyValue]:
        heads, groups = self.heads, self.groups
        both, value = self.qkv(x).unflatten(-1, (-1, self.width)).split([heads + groups, groups], 1)
        turned = _heads(packing.pad(rotation(both).flatten(1)), width=self.width)
        query, key = turned.split([heads, groups], 1)
        return query, KeyValue(key, _heads(packing.pad(value.flatten(1)), width=self.width))


class CrossAttention(nn.Module):
    """Target tokens look at the encoder's states; no positions are turned."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.heads, config.groups(), config.width(dim)
        self.query = nn.Linear(dim, self.heads * self.width, bias=bias)
        self.kv = nn.Linear(dim, 2 * self.groups * self.width, bias=bias)
        self.out = nn.Linear(self.heads * self.width, dim, bias=bias)

    def read(self, memory: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue:
        """Keys and values of the source, once per layer and batch."""
        both = _heads(packing.pad(self.kv(memory)), width=self.width)
        return KeyValue(*both.split(self.groups, 1))

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        """Attend to ``source`` where ``mask`` is true (None: everywhere)."""
        query = _heads(packing.pad(self.query(x)), width=self.width)
        return self.out(packing.pack(attend(query, source, mask=mask, causal=False)))


def attend(
    query: Float[Tensor, "B H L d"],
    keys: KeyValue,
    *,
    mask: Bool[Tensor, "B 1 #L S"] | None,
    causal: bool,
) -> Float[Tensor, "B L HD"]:
    """Softmax attention; heads come back side by side. ``mask`` is true where allowed."""
    mixed = F.scaled_dot_product_attention(
        query,
        keys.key,
        keys.value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[1] != keys.key.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)


def plain_attend(
    query: Float[Tensor, "B H L d"],
    keys: KeyValue,
    *,
    mask: Bool[Tensor, "B 1 #L S"] | None,
    causal: bool,
) -> Float[Tensor, "B L HD"]:
    """The definition of ``attend``."""
    share = query.shape[1] // keys.key.shape[1]
    key, value = (t.repeat_interleave(share, 1) for t in (keys.key, keys.value))
    score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        mask = allowed if mask is None else mask & allowed
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    return (score.softmax(-1) @ value).transpose(1, 2).flatten(2)


def _heads(flat: Float[Tensor, "B L HD"], *, width: int) -> Float[Tensor, "B H L d"]:
    return flat.unflatten(-1, (-1, width)).transpose(1, 2)
