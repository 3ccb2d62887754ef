"""Footprint: the bytes a training step needs, from the config alone.

Weights, gradients and optimizer state are exact. Activations are what autograd keeps between
forward and backward in float32 on one device, without padding or recomputation; they follow the
implementation and are tested against the tensors it really saves. A mixture keeps what the mixer of
this CPU keeps; on a GPU the kernels keep as much as the fused one.

Letters: D dim, T tokens, K experts per token, F hidden width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.model.blueprint import Blueprint, Stack
from moesaic.model.count import Sizes, count
from moesaic.moe.config import MoE, NoMoE, Sparse
from moesaic.moe.experts import Size
from moesaic.moe.gates import Place
from moesaic.nn.norm import LayerNorm
from moesaic.nn.position import Rotary
from moesaic.optim.optimizer import AdamW, Optimizer


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def footprint(config: Blueprint, *, sizes: Sizes, optimizer: Optimizer | None = None) -> Footprint:
    """Forecast one training step in float32 (the default optimizer is AdamW)."""
    weights = 4 * count(config).total
    state = optimizer_bytes(config, optimizer=optimizer or AdamW())
    return Footprint(weights, weights, state, activation_bytes(config, sizes=sizes))


def optimizer_bytes(config: Blueprint, *, optimizer: Optimizer) -> int:
    """Bytes of optimizer state, asked of its rules on tensors that hold no numbers."""
    total = 0
    for entry in count(config).entries:
        parameter = nn.Parameter(torch.empty(entry.shape, device="meta"))
        slots = optimizer.assign(parameter, kind=entry.kind)["rule"].slots(parameter)
        total += entry.copies * sum(slot.numel() * slot.element_size() for slot in slots.values())
    return total


def activation_bytes(config: Blueprint, *, sizes: Sizes) -> int:
    """Bytes that autograd keeps from the forward pass of a batch."""
    source, target = sizes.rows * sizes.source, sizes.rows * sizes.target
    values = target * _entry(config) + _head(config, tokens=target)
    if config.encoder.layers:
        values += source * (_entry(config) + _norm(config))  # the last norm's output is the memory
        values += source * _stack(config, stack=config.encoder)
    values += target * _stack(config, stack=config.decoder)
    if config.encoder.layers:
        each = target * _cross(config) + source * 2 * _key_width(config)
        values += config.decoder.layers * each
    return 4 * values


def _entry(config: Blueprint) -> int:
    turn = config.head_dim if isinstance(config.position, Rotary) else 0
    return turn + _mask(config)


def _mask(config: Blueprint) -> int:
    """Dropout keeps a byte per channel: a quarter of a value."""
    return math.ceil(config.dim / 4) if config.dropout else 0


def _norm(config: Blueprint) -> int:
    """Input, one or two statistics, and the output that the next product keeps."""
    return 2 * config.dim + (2 if isinstance(config.norm, LayerNorm) else 1)


def _key_width(config: Blueprint) -> int:
    return config.attention.groups() * config.head_dim


def _stack(config: Blueprint, *, stack: Stack) -> int:
    """Values kept per token by the self-attention and feed-forward branches of a stack."""
    values = stack.layers * (_attention(config) + config.block.norms(2) * _norm(config))
    for layer in range(stack.layers):
        sparse = config.sparse(stack, layer=layer)
        values += _dense(config) if isinstance(sparse, NoMoE) else _sparse(config, sparse=sparse)
    return values + _routers(config, stack=stack)


def _routers(config: Blueprint, *, stack: Stack) -> int:
    """What routers keep per token beyond the plain ones of ``_sparse``."""
    values, sparse = 0, stack.sparse_layers
    for index, layer in enumerate(sparse):
        moe = config.experts(stack, layer=layer)
        if moe is not None:
            place = Place("", index=index, count=len(sparse))
            values += moe.link.kept(dim=config.dim, place=place) + moe.condition.kept(config.dim)
            if index == 0:
                values += moe.link.shared_kept() + moe.condition.shared_kept(config.dim)
    return values


def _attention(config: Blueprint) -> int:
    attention = config.self_attention
    heads, query = attention.heads, attention.heads * config.head_dim
    key = attention.groups() * config.head_dim
    turned = query + key if isinstance(config.position, Rotary) else 0
    mixed = math.ceil(config.attention_experts.kept(config.attention, dim=config.dim))
    return query + 2 * key + turned + query + heads + mixed + _mask(config)


def _cross(config: Blueprint) -> int:
    query = config.attention.heads * config.head_dim
    norms = config.block.norms(3) - config.block.norms(2)
    return norms * _norm(config) + 2 * query + config.attention.heads + _mask(config)


def _dense(config: Blueprint) -> int:
    feed = config.feed_forward
    return feed.activation.kept * feed.hidden + _mask(config)


def _sparse(config: Blueprint, *, sparse: Sparse) -> int:
    dim, feed = config.dim, config.feed_forward
    inner = (
        _mixture(config, moe=sparse)
        if isinstance(sparse, MoE)
        else sparse.kept(feed_forward=feed, dim=dim)
    )
    return math.ceil(inner) + _mask(config)


def _mixture(config: Blueprint, *, moe: MoE) -> float:
    """What each part says, and the router's logits, probabilities and choices."""
    dim, feed = config.dim, moe.feed_forward(config.feed_forward)
    size = Size(moe.experts, moe.exchange.dim(dim), feed, config.bias)
    edges = moe.select.experts_per_token(moe.routed)
    around = moe.exchange.kept(dim=dim) + moe.beside.kept(feed_forward=feed, dim=dim)
    return (
        moe.expert.kept(size, edges=edges, live=moe.experts / moe.routed) + around + 3 * moe.routed
    )


def _head(config: Blueprint, *, tokens: int) -> int:
    """The last norm, and the loss's ready-made gradients of states and of the output table."""
    return tokens * (_norm(config) + config.dim) + config.vocab_size * config.dim
