"""Gated linear attention (GLA, 2312.06635): attention whose state decays by learned gates.

Each head keeps a matrix ``S`` in place of keys and values: ``S_t = diag(a_t) S_{t-1} + k_t v_t``,
``o_t = q_t S_t / sqrt(K)``, where the decay of each key channel ``a_t = sigmoid(gate(x_t)) ** (1 /
temperature)`` comes from a low-rank map. The output is ``W_o (norm(o_t) * silu(r_t))``.

Letters: T tokens, D model dim, H heads, K key channels and V value channels of a head.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.decode_state import DecodeState, TensorState
from moesaic.nn.fused_projections import FusedProjections
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.recurrence_backend import (
    ContextRecurrence,
    LocalRecurrence,
    RecurrenceBackend,
    TokenScan,
)
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    TensorSharding,
    column_parallel,
    row_parallel,
)
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup
from moesaic.ops.decayed_scan import state_dtype


class GatedLinearAttention(SequenceMixer):
    """Gated linear attention (GLA, 2312.06635): a decaying state of constant size per head.

    ``key_dim`` and ``value_dim`` are the channels of a head: by default those of all heads are half
    the model dim and the model dim. ``gate_rank`` is the width between the two maps of the decay
    gates, ``temperature`` the root that is taken of them, ``norm`` the norm of a head's output.
    """

    heads: int = Field(default=4, ge=1)
    key_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)
    gate_rank: int = Field(default=16, ge=1)
    temperature: float = Field(default=16.0, gt=0)
    norm: Norm = RMSNorm()

    branch = "linear_attention"

    def key_width(self, dim: int) -> int:
        """Key channels of a head."""
        return self.key_dim or dim // (2 * self.heads)

    def value_width(self, dim: int) -> int:
        """Value channels of a head."""
        return self.value_dim or dim // self.heads

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        return GatedLinearAttentionModule(self, shape=shape)

    def problems(self, shape: MixerShape, /) -> str | None:
        if not shape.causal:
            return "a decoder: its state has earlier tokens only"
        if self.key_dim is None and shape.dim % (2 * self.heads):
            return f"2 x heads={self.heads} to divide dim={shape.dim}, or a key_dim"
        if self.value_dim is None and shape.dim % self.heads:
            return f"heads={self.heads} to divide dim={shape.dim}, or a value_dim"
        return None

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        keys, values = self._widths(shape.dim)
        return [
            *linear_specs(shape.dim, 2 * keys + 2 * values, bias=shape.bias),
            *linear_specs(shape.dim, self.gate_rank, bias=False),
            *linear_specs(self.gate_rank, keys, bias=True),
            *self.norm.parameter_specs(self.value_width(shape.dim)),
            *linear_specs(values, shape.dim, bias=shape.bias),
        ]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        return 4.0 * tokens * self._widths(shape.dim)[0] * self.value_width(shape.dim)

    def shrink(self, _shape: MixerShape, /) -> Self:
        return self.replace(heads=2, key_dim=4, value_dim=4, gate_rank=min(self.gate_rank, 4))

    def _widths(self, dim: int) -> tuple[int, int]:
        """Key and value channels of all heads."""
        return self.heads * self.key_width(dim), self.heads * self.value_width(dim)


class GatedLinearAttentionModule(SequenceMixerModule, FusedProjections):
    """The module of ``GatedLinearAttention``; ``qkvr`` projects to q, k, v and the output gate."""

    def __init__(self, config: GatedLinearAttention, *, shape: MixerShape) -> None:
        super().__init__()
        dim, bias = shape.dim, shape.bias
        self.heads, self.temperature = config.heads, config.temperature
        self.key_dim, self.value_dim = config.key_width(dim), config.value_width(dim)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.qkvr = nn.Linear(dim, 2 * keys + 2 * values, bias=bias)
        self.gate_down = nn.Linear(dim, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, keys)
        self.norm = config.norm.build(self.value_dim)
        self.out = nn.Linear(values, dim, bias=bias)
        self.backend: RecurrenceBackend = LocalRecurrence()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        return {"qkvr.weight": (keys, keys, values, values)}

    def tensor_sharding(self) -> TensorSharding:
        segments = self.fused_outputs()["qkvr.weight"]
        gates = (self.gate_up.out_features,)
        return TensorSharding(
            column_parallel("qkvr", self.qkvr, segments=segments)
            | column_parallel("gate_up", self.gate_up, segments=gates)
            | row_parallel("out", self.out),
            divided={"heads": self.heads},
            row_parallel=("out",),
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        self.heads, self.tensor_parallel = self.heads // ranks, group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        self.backend = ContextRecurrence(scope.group)

    def init_state(self, rows: int, *, like: Tensor) -> TensorState:
        sizes = (rows, self.heads, self.key_dim, self.value_dim)
        return TensorState((like.new_zeros(sizes, dtype=state_dtype(like)),))

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Read each row's state after every token."""
        packing = context.packing
        x = self.tensor_parallel.all_gather_tokens(x, packing)
        widths = self.fused_outputs()["qkvr.weight"]
        query, key, value, gate = self.qkvr(x).split(widths, 1)
        heads = (self.heads, -1)
        tokens = TokenScan(
            query.unflatten(1, heads),
            key.unflatten(1, heads),
            value.unflatten(1, heads),
            self._log_decay(x).unflatten(1, heads),
        )
        earlier = state.tensors[0] if isinstance(state, TensorState) else None
        scanned = self.backend.scan(
            tokens, packing=packing, scale=self.key_dim**-0.5, state=earlier
        )
        if isinstance(state, TensorState):
            state.tensors = (scanned.state,)
        out = self.norm(scanned.out.flatten(0, 1)).view(gate.shape) * F.silu(gate)
        return self.tensor_parallel.reduce_scatter_tokens(self.out(out), packing)

    def _log_decay(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        """``log(sigmoid(gate)) / temperature``, at most 0."""
        gate = self.gate_up(self.gate_down(x))
        return F.softplus(-gate.to(state_dtype(gate))) * (-1 / self.temperature)
