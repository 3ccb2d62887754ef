"""Parameter and FLOP counts of a model, computed from its config; nothing is allocated.

FLOPs count matrix products (2 per weight and token) and attention (4 * context * heads * head_dim
per token; half the context where it is causal); norms, softmaxes and lookups are not counted, as is
usual. A training step costs three times the forward pass.

Letters: D dim, E experts, F hidden width, H heads, G key/value heads, d head dim, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.experts import ExpertShape
from moesaic.moe.router_gate import LayerIndex, RouterShape
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.norm import LayerNorm
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec
from moesaic.nn.positional_encoding import LearnedPositions

MAX_TENSOR_VALUES = 2**59  # 2^63 bytes hold them with room for 16 bytes a value

ATTENTION, CROSS, DENSE, EXPERTS = "self-attention", "cross-attention", "feed-forward", "experts"


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """``copies`` parameters of one shape and ``kind``, in a ``part`` of the model.

    ``active_fraction`` is the share that one token multiplies with (k / E for experts, else 1),
    ``uses_per_token`` how often.
    """

    part: str
    kind: str
    shape: tuple[int, ...]
    copies: int
    active_fraction: float = 1.0
    uses_per_token: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.copies


@dataclass(frozen=True, slots=True)
class BatchDims:
    """A batch without padding: ``rows`` pairs of ``source`` and ``target`` tokens."""

    rows: int = 1
    source: int = 32
    target: int = 32

    @property
    def tokens(self) -> int:
        return self.rows * (self.source + self.target)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters and FLOPs of a config."""

    entries: tuple[ParameterEntry, ...]
    config: ModelConfig

    @property
    def total(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def active(self) -> int:
        """Parameters that one token uses: of each MoE layer only the selected experts."""
        return round(sum(entry.size * entry.active_fraction for entry in self.entries))

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        return self._by("part")

    @property
    def kinds(self) -> dict[str, int]:
        """Parameters by kind (see ``optim.optimizer.ParameterKind``)."""
        return self._by("kind")

    def forward_flops(self, sizes: BatchDims) -> float:
        """FLOPs of one forward pass over a batch, logits included."""
        return _matrix_flops(self, sizes) + _attention_flops(self.config, sizes)

    def flops_per_token(self, sizes: BatchDims | None = None) -> float:
        """Forward FLOPs per source or target token, at these lengths."""
        sizes = sizes or _default_batch(self.config)
        return self.forward_flops(sizes) / sizes.tokens

    def training_flops_per_token(self, sizes: BatchDims | None = None) -> float:
        """Forward and backward FLOPs per token: three times the forward ones."""
        return 3 * self.flops_per_token(sizes)

    def _by(self, field: str) -> dict[str, int]:
        sums: dict[str, int] = {}
        for entry in self.entries:
            name = entry.part if field == "part" else entry.kind
            sums[name] = sums.get(name, 0) + entry.size
        return sums


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count a config's parameters, exactly, and its FLOPs.

    Raises ConfigError for a tensor that is larger than any tensor can be.
    """
    entries = tuple(_entries(config))
    largest = max(entries, key=lambda entry: math.prod(entry.shape))
    if math.prod(largest.shape) > MAX_TENSOR_VALUES:
        shape = " x ".join(f"{size:,}" for size in largest.shape)
        raise ConfigError(
            [f"model: {largest.part} has a tensor of {shape} values, expected at most 2^59"]
        )
    return ParameterCount(entries, config)


def _entries(config: ModelConfig) -> Iterator[ParameterEntry]:
    tables = 1 if config.embedding.tied else 2
    yield ParameterEntry("embedding", "embedding", (config.vocab_size, config.dim), tables)
    if isinstance(config.position, LearnedPositions):
        yield ParameterEntry("embedding", "embedding", (config.position.max_length, config.dim), 1)
    yield from _norm_entries(config, part="norms", copies=_num_norms(config))
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        yield from _stack_entries(config, stack=stack, side=side)


def _num_norms(config: ModelConfig) -> int:
    both, block = bool(config.encoder.layers), config.block_layout
    decoder = block.num_norms(3 if both else 2)
    return block.num_norms(2) * config.encoder.layers + decoder * config.decoder.layers + 1 + both


def _norm_entries(config: ModelConfig, *, part: str, copies: int) -> Iterator[ParameterEntry]:
    yield ParameterEntry(part, "norm", (config.dim,), copies)
    if isinstance(config.norm, LayerNorm) and config.norm.bias:
        yield ParameterEntry(part, "bias", (config.dim,), copies)


def _stack_entries(config: ModelConfig, *, stack: Stack, side: str) -> Iterator[ParameterEntry]:
    dim, layers = config.dim, stack.layers
    yield from _self_attention_entries(config, part=f"{side} {ATTENTION}", copies=layers)
    if side == "decoder" and config.encoder.layers:
        query, both = _projection_widths(config.attention, dim=dim)
        cross = f"{side} {CROSS}"
        for fan in ((dim, query), (dim, both), (query, dim)):
            yield from _linear_entries(config, part=cross, fan=fan, copies=layers)
    sparse = [config.moe_of_layer(stack, layer=layer) for layer in range(layers)]
    routed = [moe for moe in sparse if isinstance(moe, MoE)]
    feed, dense = config.feed_forward, sum(isinstance(moe, NoMoE) for moe in sparse)
    width = feed.activation.width(feed.hidden)
    yield from _linear_entries(config, part=f"{side} {DENSE}", fan=(dim, width), copies=dense)
    yield from _linear_entries(config, part=f"{side} {DENSE}", fan=(feed.hidden, dim), copies=dense)
    for index, moe in enumerate(routed):
        layer_index = LayerIndex(side, index=index, count=len(routed))
        yield from _moe_entries(config, moe=moe, side=side, layer_index=layer_index)
    if routed:
        shape = RouterShape(dim, routed[0].num_router_outputs)
        shared = routed[0].cross_layer.shared_parameter_specs(shape)
        yield from _entries_of_specs(shared, part=f"{side} router")
    for moe in sparse:
        if not isinstance(moe, MoE | NoMoE):
            specs = moe.parameter_specs(FeedForwardShape(dim, feed, config.bias))
            yield from _entries_of_specs(specs, part=f"{side} {moe.count_label}")


def _self_attention_entries(
    config: ModelConfig, *, part: str, copies: int
) -> Iterator[ParameterEntry]:
    dim, (query, both) = config.dim, _projection_widths(config.self_attention, dim=config.dim)
    yield from _linear_entries(config, part=part, fan=(dim, query + both), copies=copies)
    yield from _linear_entries(config, part=part, fan=(query, dim), copies=copies)
    for _ in range(copies):
        yield from _entries_of_specs(config.attention_experts.parameter_specs(dim), part=part)


def _projection_widths(config: AttentionConfig, *, dim: int) -> tuple[int, int]:
    """Widths of an attention's queries, and of its keys and values together."""
    return config.heads * config.head_width(dim), 2 * config.num_kv_heads() * config.head_width(dim)


def _moe_entries(
    config: ModelConfig, *, moe: MoE, side: str, layer_index: LayerIndex
) -> Iterator[ParameterEntry]:
    dim, feed, bias = config.dim, moe.feed_forward(config.feed_forward), config.bias
    shape = RouterShape(moe.router_input.input_dim(dim), moe.num_router_outputs, layer_index)
    gate = moe.cross_layer.gate_parameter_specs(shape)
    yield from _entries_of_specs(gate, part=f"{side} router")
    size = ExpertShape(moe.experts, moe.dispatch_projection.expert_dim(dim), feed, bias)
    yield from _entries_of_specs(
        moe.expert.parameter_specs(size, active_fraction=active_expert_fraction(moe)),
        part=f"{side} {EXPERTS}",
    )
    projection = moe.dispatch_projection.parameter_specs(dim)
    yield from _entries_of_specs(projection, part=f"{side} dispatch projection")
    shared = moe.shared_experts.parameter_specs(FeedForwardShape(dim, feed, bias))
    yield from _entries_of_specs(shared, part=f"{side} shared experts")


def active_expert_fraction(moe: MoE) -> float:
    """Return the share of the experts (null experts aside) that a token uses, on average."""
    chosen = moe.select.experts_per_token(moe.num_router_outputs)
    return min(1.0, chosen / moe.num_router_outputs)


def _entries_of_specs(specs: Iterable[ParameterSpec], *, part: str) -> Iterator[ParameterEntry]:
    for spec in specs:
        yield ParameterEntry(
            part, spec.kind, spec.shape, 1, spec.active_fraction, spec.uses_per_token
        )


def _linear_entries(
    config: ModelConfig, *, part: str, fan: tuple[int, int], copies: int
) -> Iterator[ParameterEntry]:
    if copies:
        yield ParameterEntry(part, "matrix", (fan[1], fan[0]), copies)
        if config.bias:
            yield ParameterEntry(part, "bias", (fan[1],), copies)


def _matrix_flops(counted: ParameterCount, sizes: BatchDims) -> float:
    source, target = sizes.rows * sizes.source, sizes.rows * sizes.target
    config = counted.config
    flops = 2.0 * target * config.dim * config.vocab_size
    for entry in counted.entries:
        if entry.kind not in ("matrix", "expert", "router"):
            continue
        tokens = source if entry.part.startswith("encoder") else target
        flops += 2 * tokens * entry.size * entry.active_fraction * entry.uses_per_token
    # cross-attention projects keys and values from source tokens, not from target tokens
    crossed = (
        2 * config.dim * config.attention.num_kv_heads() * config.head_dim * config.decoder.layers
    )
    return flops + (2 * (source - target) * crossed if config.encoder.layers else 0)


def _attention_flops(config: ModelConfig, sizes: BatchDims) -> float:
    width, all_heads = (
        heads.heads * config.head_dim for heads in (config.attention, config.self_attention)
    )
    causal_pairs = sizes.target * (sizes.target + 1) / 2
    within = config.encoder.layers * sizes.source**2 + config.decoder.layers * causal_pairs
    cross = config.decoder.layers * sizes.target * sizes.source if config.encoder.layers else 0
    return 4.0 * sizes.rows * (all_heads * within + width * cross)


def _default_batch(config: ModelConfig) -> BatchDims:
    return BatchDims() if config.encoder.layers else BatchDims(source=0, target=64)
