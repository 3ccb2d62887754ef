"""Mamba-2 (state space duality, 2405.21060): a state space model with one decay per head.

One projection gives a gate z, inputs x, B and C, and a step size per head. x, B and C pass a short
causal convolution; then ``S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t`` and ``y_t = C_t S_t + D x_t``
per head, with ``dt = softplus(projected + bias)`` and ``A < 0``; the output is
``W_o norm(y * silu(z))``. B and C belong to groups, each shared by several heads.

Letters: T tokens, D model dim, I inner channels, H heads, P channels of a head, G groups, N state
channels, W width of the convolution.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.decode_state import DecodeState, TensorState
from moesaic.nn.fused_projections import FusedProjections
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.recurrence_backend import (
    ContextRecurrence,
    ConvolutionWeights,
    LocalRecurrence,
    RecurrenceBackend,
    TokenScan,
)
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    ShardedTensor,
    TensorSharding,
    column_parallel,
    row_parallel,
)
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup
from moesaic.ops.decayed_scan import state_dtype
from moesaic.ops.gated_rms_norm import gated_rms_norm


class Mamba2(SequenceMixer):
    """Mamba-2 (SSD, 2405.21060): a state space model with a scalar decay per head.

    ``expand`` times the model dim are the inner channels, in heads of ``head_dim``. ``state`` is
    the number of channels of B and C, which ``groups`` of heads have each for themselves; the norm
    is over the channels of one of ``norm_groups`` (default: ``groups``). Initial step sizes are
    between ``min_step`` and ``max_step``, decay rates between 1 and ``max_decay``.
    """

    head_dim: int = Field(default=64, ge=1)
    expand: float = Field(default=2.0, gt=0)
    state: int = Field(default=128, ge=1)
    groups: int = Field(default=1, ge=1)
    norm_groups: int | None = Field(default=None, ge=1)
    width: int = Field(default=4, ge=1)
    min_step: float = Field(default=1e-3, gt=0)
    max_step: float = Field(default=0.1, gt=0)
    max_decay: float = Field(default=16.0, gt=1)

    branch = "mamba"

    def heads(self, dim: int) -> int:
        """The number of heads."""
        return round(self.expand * dim) // self.head_dim

    def segments(self, dim: int) -> tuple[int, ...]:
        """The widths of z, x, B, C and the step sizes in the input projection."""
        heads, shared = self.heads(dim), self.groups * self.state
        inner = heads * self.head_dim
        return inner, inner, shared, shared, heads

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        return Mamba2Module(self, shape=shape)

    def problems(self, shape: MixerShape, /) -> str | None:
        heads, norms = self.heads(shape.dim), self.norm_groups or self.groups
        if not shape.causal:
            return "a decoder: its state has earlier tokens only"
        if heads * self.head_dim != self.expand * shape.dim:
            return f"head_dim={self.head_dim} to divide expand x dim={self.expand * shape.dim:g}"
        if heads % self.groups or heads % norms:
            return f"groups={self.groups} and norm_groups={norms} to divide the {heads} heads"
        if self.min_step > self.max_step:
            return f"min_step={self.min_step:g} up to max_step={self.max_step:g}"
        return None

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        segments = self.segments(shape.dim)
        inner, channels, heads = segments[0], sum(segments[1:4]), segments[4]
        return [
            *linear_specs(shape.dim, sum(segments), bias=shape.bias),
            ParameterSpec("bias", (channels, self.width)),
            ParameterSpec("bias", (channels,)),
            *2 * [ParameterSpec("bias", (heads,))],
            ParameterSpec("norm", (heads,)),
            ParameterSpec("norm", (inner,)),
            *linear_specs(inner, shape.dim, bias=shape.bias),
        ]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        inner, *_ = segments = self.segments(shape.dim)
        return tokens * (4.0 * inner * self.state + 2.0 * self.width * sum(segments[1:4]))

    def shrink(self, shape: MixerShape, /) -> Self:
        groups = min(self.groups, 2)
        small = self.replace(
            groups=groups, norm_groups=self.norm_groups and min(self.norm_groups, 2)
        )
        return small.replace(head_dim=max(1, shape.dim // 4), expand=1.0, state=4)


class Mamba2Module(SequenceMixerModule, FusedProjections, CustomInitializers):
    """The module of ``Mamba2``; its state are W - 1 inputs of the convolution and ``S``."""

    def __init__(self, config: Mamba2, *, shape: MixerShape) -> None:
        super().__init__()
        dim, self.config = shape.dim, config
        segments = config.segments(dim)
        inner, self.heads = segments[0], segments[4]
        self.groups = config.groups
        self.norm_groups = config.norm_groups or config.groups
        self.projection = nn.Linear(dim, sum(segments), bias=shape.bias)
        self.convolution = ConvolutionWeights(sum(segments[1:4]), width=config.width)
        self.step_bias = nn.Parameter(torch.zeros(self.heads))
        self.log_rate = nn.Parameter(torch.zeros(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, dim, bias=shape.bias)
        self.backend: RecurrenceBackend = LocalRecurrence()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()
        with torch.no_grad():
            self.step_bias.copy_(self._step_bias(torch.rand(self.heads)))
            self.log_rate.copy_(self._log_rate(torch.rand(self.heads)))

    @property
    def segments(self) -> tuple[int, ...]:
        """The widths of z, x, B, C and the step sizes on this rank."""
        inner, shared = self.heads * self.config.head_dim, self.groups * self.config.state
        return inner, inner, shared, shared, self.heads

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        return {"projection.weight": self.segments}

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "convolution.weight": Initializer(kind="bias", quantile=self._convolution),
            "step_bias": Initializer(kind="bias", quantile=self._step_bias),
            "log_rate": Initializer(kind="bias", quantile=self._log_rate),
        }

    def tensor_sharding(self) -> TensorSharding:
        inner, _, shared, _, heads = self.segments
        channels, per_head = (inner, shared, shared), ShardedTensor(0, (heads,))
        tensors = {
            "convolution.weight": ShardedTensor(0, channels),
            "convolution.bias": ShardedTensor(0, channels),
            "step_bias": per_head,
            "log_rate": per_head,
            "skip": per_head,
            "norm_weight": ShardedTensor(0, (inner,)),
        }
        return TensorSharding(
            column_parallel("projection", self.projection, segments=self.segments)
            | tensors
            | row_parallel("out", self.out),
            divided={"heads": heads, "groups": self.groups, "norm groups": self.norm_groups},
            row_parallel=("out",),
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        self.heads, self.groups = self.heads // ranks, self.groups // ranks
        self.norm_groups //= ranks
        self.tensor_parallel = group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        self.backend = ContextRecurrence(scope.group)

    def init_state(self, rows: int, *, like: Tensor) -> TensorState:
        sizes = (rows, self.heads, self.config.state, self.config.head_dim)
        inputs = (rows, self.convolution.num_earlier, sum(self.segments[1:4]))
        return TensorState((like.new_zeros(inputs), like.new_zeros(sizes, dtype=state_dtype(like))))

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Read each row's state after every token."""
        packing = context.packing
        x = self.tensor_parallel.all_gather_tokens(x, packing)
        inner, _, shared, _, heads = self.segments
        gate, joined, step = self.projection(x).split((inner, inner + 2 * shared, heads), 1)
        earlier = state.tensors if isinstance(state, TensorState) else (None, None)
        convolved = self.backend.convolve(
            joined, packing=packing, weights=self.convolution, earlier=earlier[0]
        )
        inputs, key, query = convolved.out.split((inner, shared, shared), 1)
        inputs = inputs.unflatten(1, (self.heads, -1))
        step = F.softplus(step.to(state_dtype(step)) + self.step_bias)[..., None]
        tokens = TokenScan(
            query.unflatten(1, (self.groups, -1)),
            key.unflatten(1, (self.groups, -1)),
            inputs * step,
            step * -self.log_rate.exp()[:, None],
        )
        scanned = self.backend.scan(tokens, packing=packing, scale=1.0, state=earlier[1])
        if isinstance(state, TensorState):
            state.tensors = (convolved.last_inputs, scanned.state)
        out = (scanned.out + inputs * self.skip[:, None]).flatten(1)
        out = gated_rms_norm(
            out, gate=gate, weight=self.norm_weight, groups=self.norm_groups, eps=1e-5
        )
        out = self.out(out.to(gate.dtype))
        return self.tensor_parallel.reduce_scatter_tokens(out, packing)

    def _step_bias(self, uniform: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return the inverse of softplus at step sizes whose logarithm is uniform."""
        low, high = math.log(self.config.min_step), math.log(self.config.max_step)
        step = (low + (high - low) * uniform).exp()
        return step + torch.log(-torch.expm1(-step))

    def _log_rate(self, uniform: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return (1.0 + (self.config.max_decay - 1.0) * uniform).log()

    def _convolution(self, uniform: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return (2 * uniform - 1) * self.config.width**-0.5
