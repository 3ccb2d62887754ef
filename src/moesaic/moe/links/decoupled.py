"""Decoupled: one router per stack, which decides for all its layers before the first one runs.

Letters: T tokens, D model dim, W router dim, E experts, B rows, n newest tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import RouterState
from moesaic.moe.gates import (
    RouterInput,
    RouterStateWidths,
    CrossLayerRouting,
    LayerIndex,
    GateOutput,
    SharedRouter,
    StackInput,
    HiddenState,
)
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.activation import SwiGLU
from moesaic.nn.attention import AttentionConfig, SelfAttention
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.looking import KeyValue
from moesaic.nn.position import Rotary
from moesaic.nn.start import CustomInitializers, Initializer


class DecoupledRouting(CrossLayerRouting):
    """Read-ME's decoupled router (2410.19123): a small causal transformer, one set of logits.

    One pre-norm block of ``heads`` attention heads and a SwiGLU feed-forward of twice its ``dim``
    reads what enters the stack (embeddings and positions; the paper's has a table of its own) and
    says which experts a token takes in every MoE layer; the layers have no gates. In the encoder
    it looks both ways. In decoding it keeps keys and values of its own. Norms have no gains. Noise
    and balance act in each layer as ever. All MoE layers of a stack have the same number of
    experts.
    """

    dim: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "DecoupledRouting":
        if self.dim % (2 * self.heads):
            raise ValueError(f"heads={self.heads} of an even width to divide dim={self.dim}")
        return self

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        del dim, experts, layer_index
        return PrecomputedGate()

    def gate_parameter_specs(self, *, dim: int, experts: int, layer_index: LayerIndex) -> Sequence[ParameterSpec]:
        del dim, experts, layer_index
        return ()

    def build_shared(self, *, dim: int, experts: int, causal: bool) -> SharedRouter | None:
        return DecoupledRouter(self, dim=dim, experts=experts, causal=causal)

    def shared_parameter_specs(self, *, dim: int, experts: int) -> Sequence[ParameterSpec]:
        shapes = [
            (self.dim, dim),
            (3 * self.dim, self.dim),
            (self.dim, self.dim),
            (4 * self.dim, self.dim),
            (self.dim, 2 * self.dim),
            (experts, self.dim),
        ]
        return [ParameterSpec("router", shape) for shape in shapes]

    def state_widths(self, *, experts: int) -> RouterStateWidths:
        return RouterStateWidths(logits=experts)

    def saved_activations(self, *, dim: int, layer_index: LayerIndex) -> int:
        del layer_index
        return -dim

    def shared_saved_activations(self) -> int:
        return 20 * self.dim + self.heads + 3

    def problems(self, *, experts: Sequence[int], router_input: RouterInput) -> str | None:
        if not isinstance(router_input, HiddenState):
            return "condition=Unconditioned, since no layer has a gate that could read it"
        return f"one number of experts in a stack, not {experts}" if len(set(experts)) > 1 else None


class PrecomputedGate(nn.Module):
    """The gate of a layer for which all is decided."""

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        del x
        if router_state.logits is None:
            raise TypeError("a decoupled layer needs the logits of its stack's DecoupledRouter")
        return GateOutput(router_state.logits, router_state)


class DecoupledRouter(SharedRouter, CustomInitializers):
    """The transformer of a stack, without autocast."""

    def __init__(self, config: DecoupledRouting, *, dim: int, experts: int, causal: bool) -> None:
        super().__init__()
        width = config.dim
        self.project = nn.Parameter(torch.empty(width, dim))
        self.attention = SelfAttention(AttentionConfig(heads=config.heads), dim=width, bias=False)
        feed = FeedForwardConfig(hidden=2 * width, activation=SwiGLU())
        self.feed_forward = DenseFeedForward(feed, dim=width, bias=False)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.position = Rotary().build(dim=width, head_dim=width // config.heads)
        self.causal = causal

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(self.project.dtype) @ self.project.t()
            h = h + self._attend(_rms_norm(h), stack_input=stack_input)
            h = h + self.feed_forward(_rms_norm(h))
            return RouterState(logits=_rms_norm(h).float() @ self.weight.float().t())

    def empty_cache(self, rows: int) -> KeyValue | None:
        heads, width = self.attention.heads, self.attention.head_dim
        empty = self.project.new_zeros(rows, heads, 0, width)
        return KeyValue(empty, empty)

    def initializers(self) -> Mapping[str, Initializer]:
        inner = {name: p for name, p in self.named_parameters() if name != "weight"}
        return {name: Initializer(std=p.shape[1] ** -0.5) for name, p in inner.items()}

    def _attend(self, h: Float[Tensor, "T W"], *, stack_input: StackInput) -> Float[Tensor, "T W"]:
        rotation, past = self.position.rotation(stack_input.position), stack_input.decode_state
        if past is None or past.cache is None:
            return self.attention(h, packing=stack_input.packing, rotation=rotation, causal=self.causal)
        return self.attention.step(
            h, packing=stack_input.packing, rotation=rotation, cache=past.cache, position=past.position
        )


def _rms_norm(h: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    return F.rms_norm(h, (h.shape[-1],))
