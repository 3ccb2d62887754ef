"""Training memory of one process: the bytes of a training step, computed from the config.

Weights, gradients and optimizer state are exact. Activations are the tensors that autograd saves
for backward in float32 on one device, without padding or activation checkpointing; the formulas
follow the implementation, and tests compare them with the tensors that are saved. MoE layers save
what the fused kernels save, on CPU and GPU, whether or not this machine could compile one.

Letters: D dim, T tokens, K experts per token, F hidden width, V vocabulary.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims, count_parameters, num_branches
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.experts import ExpertShape
from moesaic.moe.router_gate import LayerIndex, RouterShape
from moesaic.nn.cross_attention import CrossAttentionCount
from moesaic.nn.parameter_spec import FeedForwardShape
from moesaic.optim.optimizer import AdamW, Optimizer


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of weights, gradients, optimizer state and activations."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_training_memory(
    config: ModelConfig, *, sizes: BatchDims, optimizer: Optimizer | None = None
) -> TrainingMemory:
    """Estimate the memory of a training step in float32 (the default optimizer is AdamW)."""
    weights = 4 * count_parameters(config).total
    state = optimizer_bytes(config, optimizer=optimizer or AdamW())
    return TrainingMemory(weights, weights, state, activation_bytes(config, sizes=sizes))


def optimizer_bytes(config: ModelConfig, *, optimizer: Optimizer) -> int:
    """Return the bytes of optimizer state, from the state of tensors on the meta device."""
    total = 0
    for entry in count_parameters(config).entries:
        parameter = nn.Parameter(torch.empty(entry.shape, device="meta"))
        state = optimizer.param_group(parameter, kind=entry.kind)["rule"].initial_state(parameter)
        total += entry.copies * sum(slot.nbytes for slot in state.values())
    return total


def activation_bytes(config: ModelConfig, *, sizes: BatchDims) -> int:
    """Return the bytes that autograd saves in the forward pass of a batch."""
    source, target = sizes.rows * sizes.source, sizes.rows * sizes.target
    values = target * _dropout_mask_values(config) + _loss_values(config, tokens=target)
    if config.encoder.layers:
        # the last norm's output is what cross-attention reads
        values += source * (_dropout_mask_values(config) + _norm_values(config))
        values += source * _stack_values(config, side="encoder")
        values += sizes.rows * _row_values(config, side="encoder", tokens=sizes.source)
    values += target * _stack_values(config, side="decoder")
    values += sizes.rows * _row_values(config, side="decoder", tokens=sizes.target)
    if config.encoder.layers:
        cross = CrossAttentionCount(config.attention, config.dim, config.bias)
        each = target * (cross.saved_per_target() + _dropout_mask_values(config))
        values += config.decoder.layers * (each + source * cross.saved_per_source())
    return 4 * values


def _row_values(config: ModelConfig, *, side: str, tokens: int) -> int:
    """Values that a stack's mixers save for a row of ``tokens`` tokens, beside those of each."""
    mixers, shape = config.mixers_of_stack(config.stack_of(side)), config.mixer_shape(side)
    return sum(mixer.saved_per_row(shape, tokens=tokens) for mixer in mixers)


def _dropout_mask_values(config: ModelConfig) -> int:
    """A dropout mask has a byte per channel: a quarter of a value."""
    return math.ceil(config.dim / 4) if config.dropout else 0


def _norm_values(config: ModelConfig) -> int:
    """The input, one or two statistics, and the output, which the next linear map saves."""
    return 2 * config.dim + config.norm.saved_statistics()


def _stack_values(config: ModelConfig, *, side: str) -> int:
    """Values saved per token by the mixers and feed-forward branches of a stack."""
    stack, shape = config.stack_of(side), config.mixer_shape(side)
    values, shared = 0, dict[Hashable, int]()
    for layer in range(stack.layers):
        mixers = config.mixers_of_layer(stack, layer=layer)
        branches = num_branches(config, side=side, layer=layer)
        values += config.block_layout.num_norms(branches) * _norm_values(config)
        for mixer in mixers:
            values += mixer.saved_activations(shape) + _dropout_mask_values(config)
            shared |= mixer.shared_activations(shape)
        if not stack.block_pattern(layer).feed_forward:
            continue
        sparse = config.moe_of_layer(stack, layer=layer)
        values += (
            _feed_forward_values(config)
            if isinstance(sparse, NoMoE)
            else _moe_layer_values(config, sparse=sparse)
        )
    return values + sum(shared.values()) + _shared_router_values(config, stack=stack)


def _shared_router_values(config: ModelConfig, *, stack: Stack) -> int:
    """Values saved per token by cross-layer routers and router inputs."""
    values, layers = 0, stack.moe_layers
    for index, layer in enumerate(layers):
        moe = config.routed_moe_of_layer(stack, layer=layer)
        if moe is not None:
            layer_index = LayerIndex("", index=index, count=len(layers))
            shape = RouterShape(config.dim, moe.num_router_outputs, layer_index)
            values += moe.cross_layer.saved_activations(shape)
            values += moe.router_input.saved_activations(config.dim)
            if index == 0:
                values += moe.cross_layer.shared_saved_activations()
                values += moe.router_input.shared_saved_activations(config.dim)
    return values


def _feed_forward_values(config: ModelConfig) -> int:
    feed = config.feed_forward
    return feed.activation.saved_activations * feed.hidden + _dropout_mask_values(config)


def _moe_layer_values(config: ModelConfig, *, sparse: SparseLayer) -> int:
    dim, feed = config.dim, config.feed_forward
    inner = (
        _routed_experts_values(config, moe=sparse)
        if isinstance(sparse, MoE)
        else sparse.saved_activations(FeedForwardShape(dim, feed, config.bias))
    )
    return math.ceil(inner) + _dropout_mask_values(config)


def _routed_experts_values(config: ModelConfig, *, moe: MoE) -> float:
    """Experts, what is around them, and the router's logits, probabilities and selection."""
    dim, feed = config.dim, moe.feed_forward(config.feed_forward)
    size = ExpertShape(moe.experts, moe.dispatch_projection.expert_dim(dim), feed, config.bias)
    edges = moe.select.experts_per_token(moe.num_router_outputs)
    live_fraction = moe.experts / moe.num_router_outputs
    around = moe.dispatch_projection.saved_activations(dim)
    around += moe.shared_experts.saved_activations(FeedForwardShape(dim, feed, config.bias))
    experts = moe.expert.saved_activations(size, edges=edges, live_fraction=live_fraction)
    return experts + around + 3 * moe.num_router_outputs


def _loss_values(config: ModelConfig, *, tokens: int) -> int:
    """The last norm, and what the head saves."""
    each, once = config.head.saved_activations(config.head_shape)
    return tokens * (_norm_values(config) + each) + once
