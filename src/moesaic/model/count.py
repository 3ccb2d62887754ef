"""Count: a model as arithmetic, from its config alone. Nothing is allocated.

FLOPs count matrix products (2 per weight and token) and attention (4 * context * heads * head_dim
per token; half the context where it is causal); norms, softmaxes and lookups are left out, as is
usual. A training step costs three times the forward pass.

Letters: D dim, E experts, F hidden width, H heads, G key/value heads, d head dim, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moesaic.model.blueprint import Blueprint, Stack
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.experts import Size
from moesaic.moe.gates import Place
from moesaic.moe.pieces import Piece
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.norm import LayerNorm
from moesaic.nn.position import Learned

ATTENTION, CROSS, DENSE, EXPERTS = "self-attention", "cross-attention", "feed-forward", "experts"


@dataclass(frozen=True, slots=True)
class Entry:
    """``copies`` parameters of one shape. ``part`` is where (``encoder experts``), ``kind`` what.

    ``used`` is the share of it that one token multiplies with: k / E for experts, else 1; ``times``
    is how often it does.
    """

    part: str
    kind: str
    shape: tuple[int, ...]
    copies: int
    used: float = 1.0
    times: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.copies


@dataclass(frozen=True, slots=True)
class Sizes:
    """A batch without padding: ``rows`` pairs of ``source`` and ``target`` tokens."""

    rows: int = 1
    source: int = 32
    target: int = 32

    @property
    def tokens(self) -> int:
        return self.rows * (self.source + self.target)


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters and FLOPs of a config."""

    entries: tuple[Entry, ...]
    config: Blueprint

    @property
    def total(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def active(self) -> int:
        """Parameters that one token uses: of each expert layer only the chosen share."""
        return round(sum(entry.size * entry.used for entry in self.entries))

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        return self._by("part")

    @property
    def kinds(self) -> dict[str, int]:
        """Parameters by kind (what optimizers look at)."""
        return self._by("kind")

    def forward_flops(self, sizes: Sizes) -> float:
        """FLOPs of one forward pass over a batch, logits included."""
        return _matrix_flops(self, sizes) + _attention_flops(self.config, sizes)

    def flops_per_token(self, sizes: Sizes | None = None) -> float:
        """Forward FLOPs per token of either side, at these lengths."""
        sizes = sizes or _usual(self.config)
        return self.forward_flops(sizes) / sizes.tokens

    def training_flops_per_token(self, sizes: Sizes | None = None) -> float:
        """Forward and backward FLOPs per token: three times the forward ones."""
        return 3 * self.flops_per_token(sizes)

    def _by(self, field: str) -> dict[str, int]:
        sums: dict[str, int] = {}
        for entry in self.entries:
            name = entry.part if field == "part" else entry.kind
            sums[name] = sums.get(name, 0) + entry.size
        return sums


def count(config: Blueprint) -> Count:
    """Count a config's parameters, exactly, and give its FLOPs."""
    return Count(tuple(_entries(config)), config)


def _entries(config: Blueprint) -> Iterator[Entry]:
    tables = 1 if config.embedding.tied else 2
    yield Entry("embedding", "embedding", (config.vocab_size, config.dim), tables)
    if isinstance(config.position, Learned):
        yield Entry("embedding", "embedding", (config.position.max, config.dim), 1)
    yield from _norms(config, part="norms", copies=_num_norms(config))
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        yield from _stack(config, stack=stack, side=side)


def _num_norms(config: Blueprint) -> int:
    both, block = bool(config.encoder.layers), config.block
    decoder = block.norms(3 if both else 2)
    return block.norms(2) * config.encoder.layers + decoder * config.decoder.layers + 1 + both


def _norms(config: Blueprint, *, part: str, copies: int) -> Iterator[Entry]:
    yield Entry(part, "norm", (config.dim,), copies)
    if isinstance(config.norm, LayerNorm) and config.norm.bias:
        yield Entry(part, "bias", (config.dim,), copies)


def _stack(config: Blueprint, *, stack: Stack, side: str) -> Iterator[Entry]:
    dim, layers = config.dim, stack.layers
    yield from _self_attention(config, part=f"{side} {ATTENTION}", copies=layers)
    if side == "decoder" and config.encoder.layers:
        query, both = _widths(config.attention, dim=dim)
        cross = f"{side} {CROSS}"
        for fan in ((dim, query), (dim, both), (query, dim)):
            yield from _linear(config, part=cross, fan=fan, copies=layers)
    bodies = [config.sparse(stack, layer=layer) for layer in range(layers)]
    mixtures = [body for body in bodies if isinstance(body, MoE)]
    feed, dense = config.feed_forward, sum(isinstance(body, NoMoE) for body in bodies)
    width = feed.activation.width(feed.hidden)
    yield from _linear(config, part=f"{side} {DENSE}", fan=(dim, width), copies=dense)
    yield from _linear(config, part=f"{side} {DENSE}", fan=(feed.hidden, dim), copies=dense)
    for index, moe in enumerate(mixtures):
        place = Place(side, index=index, count=len(mixtures))
        yield from _mixture(config, moe=moe, side=side, place=place)
    if mixtures:
        shared = mixtures[0].link.shared_pieces(dim=dim, experts=mixtures[0].routed)
        yield from _pieces(shared, part=f"{side} router")
    for body in bodies:
        if not isinstance(body, MoE | NoMoE):
            pieces = body.pieces(feed_forward=feed, dim=dim, bias=config.bias)
            yield from _pieces(pieces, part=f"{side} {body.part}")


def _self_attention(config: Blueprint, *, part: str, copies: int) -> Iterator[Entry]:
    dim, (query, both) = config.dim, _widths(config.self_attention, dim=config.dim)
    yield from _linear(config, part=part, fan=(dim, query + both), copies=copies)
    yield from _linear(config, part=part, fan=(query, dim), copies=copies)
    for _ in range(copies):
        yield from _pieces(config.attention_experts.pieces(dim=dim), part=part)


def _widths(config: AttentionConfig, *, dim: int) -> tuple[int, int]:
    """Widths of an attention's queries, and of its keys and values together."""
    return config.heads * config.width(dim), 2 * config.groups() * config.width(dim)


def _mixture(config: Blueprint, *, moe: MoE, side: str, place: Place) -> Iterator[Entry]:
    dim, feed, bias = config.dim, moe.feed_forward(config.feed_forward), config.bias
    reads = moe.condition.dim(dim)
    gate = moe.link.gate_pieces(dim=reads, experts=moe.routed, place=place)
    yield from _pieces([*gate, *moe.condition.pieces(dim=dim)], part=f"{side} router")
    size = Size(moe.experts, moe.exchange.dim(dim), feed, bias)
    yield from _pieces(moe.expert.pieces(size, used=used_share(moe)), part=f"{side} {EXPERTS}")
    around = [
        *moe.exchange.pieces(dim=dim),
        *moe.beside.pieces(feed_forward=feed, dim=dim, bias=bias),
    ]
    yield from _pieces(around, part=f"{side} beside experts")


def used_share(moe: MoE) -> float:
    """The share of the working experts that a token uses, on average."""
    chosen = moe.select.experts_per_token(moe.routed)
    return min(1.0, chosen / moe.routed)


def _pieces(pieces: Iterable[Piece], *, part: str) -> Iterator[Entry]:
    for piece in pieces:
        yield Entry(part, piece.kind, piece.shape, 1, piece.used, piece.times)


def _linear(config: Blueprint, *, part: str, fan: tuple[int, int], copies: int) -> Iterator[Entry]:
    if copies:
        yield Entry(part, "matrix", (fan[1], fan[0]), copies)
        if config.bias:
            yield Entry(part, "bias", (fan[1],), copies)


def _matrix_flops(counted: Count, sizes: Sizes) -> float:
    source, target = sizes.rows * sizes.source, sizes.rows * sizes.target
    config = counted.config
    flops = 2.0 * target * config.dim * config.vocab_size
    for entry in counted.entries:
        if entry.kind not in ("matrix", "expert", "router"):
            continue
        tokens = source if entry.part.startswith("encoder") else target
        flops += 2 * tokens * entry.size * entry.used * entry.times
    # keys and values of the cross-attention are made of source tokens, not of target tokens
    crossed = 2 * config.dim * config.attention.groups() * config.head_dim * config.decoder.layers
    return flops + (2 * (source - target) * crossed if config.encoder.layers else 0)


def _attention_flops(config: Blueprint, sizes: Sizes) -> float:
    width, all_heads = (
        heads.heads * config.head_dim for heads in (config.attention, config.self_attention)
    )
    own = config.encoder.layers * sizes.source**2 + config.decoder.layers * _causal(sizes.target)
    cross = config.decoder.layers * sizes.target * sizes.source if config.encoder.layers else 0
    return 4.0 * sizes.rows * (all_heads * own + width * cross)


def _causal(length: int) -> float:
    return length * (length + 1) / 2


def _usual(config: Blueprint) -> Sizes:
    return Sizes() if config.encoder.layers else Sizes(source=0, target=64)
