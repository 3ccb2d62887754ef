"""Footprint: the bytes a training step needs, from the config alone.

Weights, gradients and optimizer state are exact. Activations are what autograd keeps between
forward and backward in float32 on one device, without padding or recomputation; they follow the
implementation and are tested against the tensors it really saves.

Letters: D dim, T tokens, K experts per token, F hidden width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.model.blueprint import Blueprint, Stack
from moesaic.model.count import Sizes, count, expert_feed_forward
from moesaic.nn.norm import LayerNorm
from moesaic.nn.position import Rotary
from moesaic.ops.choose import pick_mixer
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
    return config.dim if config.dropout else 0


def _norm(config: Blueprint) -> int:
    """Input, one or two statistics, and the output that the next product keeps."""
    return 2 * config.dim + (2 if isinstance(config.norm, LayerNorm) else 1)


def _key_width(config: Blueprint) -> int:
    return config.attention.groups() * config.head_dim


def _stack(config: Blueprint, *, stack: Stack) -> int:
    """Values kept per token by the self-attention and feed-forward branches of a stack."""
    values = stack.layers * _attention(config)
    for layer in range(stack.layers):
        sparse = config.experts(stack, layer=layer) is not None
        values += _sparse(config) if sparse else _dense(config)
    return values


def _attention(config: Blueprint) -> int:
    heads = config.attention.heads
    query, key = heads * config.head_dim, _key_width(config)
    turned = query + key if isinstance(config.position, Rotary) else 0
    return _norm(config) + query + 2 * key + turned + query + heads + _mask(config)


def _cross(config: Blueprint) -> int:
    query = config.attention.heads * config.head_dim
    return _norm(config) + 2 * query + config.attention.heads + _mask(config)


def _dense(config: Blueprint) -> int:
    feed = config.feed_forward
    return _norm(config) + feed.activation.kept * feed.hidden + _mask(config)


def _sparse(config: Blueprint) -> int:
    """What the mixer of this machine keeps of each edge; logits, probabilities and choices."""
    moe = config.experts(Stack(layers=1, moe_every=1), layer=0)
    if moe is None:
        return 0
    k = moe.select.experts_per_token(moe.experts)
    feed = expert_feed_forward(config.feed_forward, moe=moe)
    mixer = pick_mixer(torch.empty(0), activation=feed.activation)
    width = feed.activation.width(feed.hidden)
    edge = mixer.kept(dim=config.dim, width=width, bias=config.bias)
    return _norm(config) + math.ceil(k * edge) + 3 * moe.experts + _mask(config)


def _head(config: Blueprint, *, tokens: int) -> int:
    """The last norm, and the loss's ready-made gradients of states and of the output table."""
    return tokens * (_norm(config) + config.dim) + config.vocab_size * config.dim
