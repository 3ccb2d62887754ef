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
from moesaic.model.config import ModelConfig
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.experts import ExpertShape
from moesaic.moe.router_gate import LayerIndex, RouterShape
from moesaic.nn.cross_attention import CrossAttentionCount
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec

MAX_TENSOR_VALUES = 2**59  # 2^63 bytes hold them with room for 16 bytes a value

CROSS, DENSE, EXPERTS = "cross-attention", "feed-forward", "experts"


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
        return _matrix_flops(self, sizes) + _mixing_flops(self.config, sizes)

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
    yield from _entries_of_specs(config.input.parameter_specs(config.input_shape), part="embedding")
    yield from _entries_of_specs(config.position.parameter_specs(config.dim), part="embedding")
    norm = config.norm.parameter_specs(config.dim)
    yield from _entries_of_specs(norm, part="norms", copies=num_norms(config))
    for side in ("encoder", "decoder"):
        yield from _stack_entries(config, side=side)
    yield from _entries_of_specs(config.head.parameter_specs(config.head_shape), part="head")


def num_norms(config: ModelConfig) -> int:
    """Return the norms of a model: of branches or blocks, and after each stack."""
    both = bool(config.encoder.layers)
    norms = 1 + both
    for side in ("encoder", "decoder"):
        stack = config.stack_of(side)
        for layer in range(stack.layers):
            norms += config.block_layout.num_norms(num_branches(config, side=side, layer=layer))
    return norms


def num_branches(config: ModelConfig, *, side: str, layer: int) -> int:
    """Return the residual branches of a block: mixers, cross-attention, feed-forward."""
    block = config.stack_of(side).block_pattern(layer)
    cross = side == "decoder" and bool(config.encoder.layers)
    return len(block.branches) + cross + block.feed_forward


def _stack_entries(config: ModelConfig, *, side: str) -> Iterator[ParameterEntry]:
    dim, stack, shape = config.dim, config.stack_of(side), config.mixer_shape(side)
    layers = range(stack.layers)
    for mixer in config.mixers_of_stack(stack):
        part = f"{side} {mixer.branch.replace('_', '-')}"
        yield from _entries_of_specs(mixer.parameter_specs(shape), part=part)
    if side == "decoder" and config.encoder.layers:
        specs = CrossAttentionCount(config.attention, dim, config.bias).parameter_specs()
        yield from _entries_of_specs(specs, part=f"{side} {CROSS}", copies=stack.layers)
    if stack.layers:
        bias = config.position.score_bias_specs(config.attention.heads)
        yield from _entries_of_specs(bias, part=f"{side} positions")
    with_feed_forward = [i for i in layers if stack.block_pattern(i).feed_forward]
    sparse = [config.moe_of_layer(stack, layer=layer) for layer in with_feed_forward]
    routed = [moe for moe in sparse if isinstance(moe, MoE)]
    feed, dense = config.feed_forward, sum(isinstance(moe, NoMoE) for moe in sparse)
    if dense:
        specs = FeedForwardShape(dim, feed, config.bias).parameter_specs()
        yield from _entries_of_specs(specs, part=f"{side} {DENSE}", copies=dense)
    for index, moe in enumerate(routed):
        layer_index = LayerIndex(side, index=index, count=len(routed))
        yield from _moe_entries(config, moe=moe, side=side, layer_index=layer_index)
    if routed:
        router = RouterShape(dim, routed[0].num_router_outputs)
        shared = routed[0].cross_layer.shared_parameter_specs(router)
        yield from _entries_of_specs(shared, part=f"{side} router")
    for moe in sparse:
        if not isinstance(moe, MoE | NoMoE):
            specs = moe.parameter_specs(FeedForwardShape(dim, feed, config.bias))
            yield from _entries_of_specs(specs, part=f"{side} {moe.count_label}")


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


def _entries_of_specs(
    specs: Iterable[ParameterSpec], *, part: str, copies: int = 1
) -> Iterator[ParameterEntry]:
    for spec in specs:
        yield ParameterEntry(
            part, spec.kind, spec.shape, copies, spec.active_fraction, spec.uses_per_token
        )


def _matrix_flops(counted: ParameterCount, sizes: BatchDims) -> float:
    source, target = sizes.rows * sizes.source, sizes.rows * sizes.target
    config = counted.config
    flops = 2.0 * target * head_parameters(config)
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


def head_parameters(config: ModelConfig) -> int:
    """Return the values of the matrices that a predicted state is multiplied with."""
    shape = config.head_shape
    table = shape.vocab_size * shape.dim if config.head.reads_table else 0
    specs = config.head.parameter_specs(shape)
    return table + sum(math.prod(spec.shape) for spec in specs if len(spec.shape) > 1)


def _mixing_flops(config: ModelConfig, sizes: BatchDims) -> float:
    """FLOPs of mixing tokens, by mixers and by cross-attention, beside matrix products."""
    flops = 0.0
    for side, tokens in (("encoder", sizes.source), ("decoder", sizes.target)):
        stack, shape = config.stack_of(side), config.mixer_shape(side)
        mixers = config.mixers_of_stack(stack)
        flops += sum(mixer.mixing_flops(shape, tokens=tokens) for mixer in mixers)
    width, _ = config.attention.widths(config.dim)
    cross = config.decoder.layers * sizes.target * sizes.source if config.encoder.layers else 0
    return sizes.rows * (flops + 4.0 * width * cross)


def _default_batch(config: ModelConfig) -> BatchDims:
    return BatchDims() if config.encoder.layers else BatchDims(source=0, target=64)
