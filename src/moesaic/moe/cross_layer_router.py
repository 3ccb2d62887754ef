"""Cross-layer routers: pre-gated, recurrent and decoupled coupling of the routers of a stack.

Letters: T tokens, D model dim, C what a gate reads, P width of the recurrent state, W dim of the
decoupled router, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.router_context import RouterState
from moesaic.moe.router_gate import (
    CrossLayerRouting,
    GateOutput,
    HiddenState,
    RouterInput,
    RouterShape,
    RouterStateWidths,
    SharedRouter,
    StackInput,
)
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig, SwiGLU
from moesaic.nn.initializer import (
    CustomInitializers,
    Initializer,
    fan_in_std,
    normal_parameter,
    router_std,
)
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.sequence_mixer import MixerShape


class PreGatedRouting(CrossLayerRouting):
    """Pre-gated MoE (2308.12066): layer l computes the logits of layer l + 1 from its own input.

    The first MoE layer of a stack has two gates, its own and that of the next; the last has none.
    Noise, selection, capacity limits and balance apply where the logits are used. All MoE layers
    of a stack have the same number of experts.
    """

    def build_gate(self, shape: RouterShape, /) -> nn.Module:
        return PreGate(shape)

    def gate_parameter_specs(self, shape: RouterShape, /) -> Sequence[ParameterSpec]:
        at = shape.layer_index
        gates = (at.index == 0) + (at.index + 1 < at.count)
        return (ParameterSpec("router", (shape.experts, shape.dim)),) * gates

    def state_widths(self, shape: RouterShape, /) -> RouterStateWidths:
        return RouterStateWidths(logits=shape.experts)

    def problems(self, experts: Sequence[int], _router_input: RouterInput, /) -> str | None:
        return _unequal(experts)


class PreGate(nn.Module):
    """``weight`` is the gate of this layer, ``ahead`` that of the next, where they exist."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        at = shape.layer_index
        first, last = at.index == 0, at.index + 1 == at.count
        self.weight = _gate_weight(shape) if first else None
        self.ahead = None if last else _gate_weight(shape)

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        logits = router_state.logits if self.weight is None else x @ self.weight.float().t()
        if logits is None:
            raise TypeError("a pre-gated layer needs the logits from the MoE layer below it")
        ahead = None if self.ahead is None else x @ self.ahead.float().t()
        return GateOutput(logits, replace(router_state, logits=ahead))


def _gate_weight(shape: RouterShape) -> nn.Parameter:
    return normal_parameter(shape.experts, shape.dim, std=router_std(shape.dim))


class RecurrentRouting(CrossLayerRouting):
    """RMoE, the layerwise recurrent router (2408.06793): a GRU over the MoE layers of a stack.

    Each layer projects its router input to ``width`` numbers. One GRU cell, shared by all layers,
    updates the token's state from the layer below with them; the layer's own matrix maps the new
    state to logits. Gradients flow through the state to all layers below. The first layer's state
    comes from zeros. Encoder and decoder have a cell each.
    """

    shared_every_layer: ClassVar[bool] = True
    width: int = Field(default=128, ge=1)

    def build_gate(self, shape: RouterShape, /) -> nn.Module:
        return RecurrentGate(dim=shape.dim, width=self.width, experts=shape.experts)

    def gate_parameter_specs(self, shape: RouterShape, /) -> Sequence[ParameterSpec]:
        sizes = ((self.width, shape.dim), (shape.experts, self.width))
        return [ParameterSpec("router", size) for size in sizes]

    def build_shared(self, _shape: RouterShape, /) -> SharedRouter | None:
        return RecurrentRouterCell(self.width)

    def shared_parameter_specs(self, _shape: RouterShape, /) -> Sequence[ParameterSpec]:
        matrix = ParameterSpec("router", (3 * self.width, self.width))
        bias = ParameterSpec("bias", (3 * self.width,))
        return (matrix, matrix, bias, bias)

    def state_widths(self, _shape: RouterShape, /) -> RouterStateWidths:
        return RouterStateWidths(hidden=self.width)


class RecurrentRouterCell(SharedRouter, CustomInitializers):
    """The GRU cell of a stack, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(width, width)

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        del stack_input
        zeros = torch.zeros(x.shape[0], self.width, device=x.device)
        return RouterState(hidden=zeros, shared=self)

    def forward(
        self, x: Float[Tensor, "T P"], *, hidden: Float[Tensor, "T P"]
    ) -> Float[Tensor, "T P"]:
        """Return the hidden states after a layer."""
        cell = self.cell
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        return torch.gru_cell(x, hidden, *(weight.float() for weight in weights))

    def initializers(self) -> Mapping[str, Initializer]:
        matrix, bias = Initializer(std=self.width**-0.5), Initializer(kind="bias")
        return {
            "cell.weight_ih": matrix,
            "cell.weight_hh": matrix,
            "cell.bias_ih": bias,
            "cell.bias_hh": bias,
        }


class RecurrentGate(CustomInitializers):
    """One layer's projection into the GRU cell, and its map from the hidden state to logits."""

    def __init__(self, *, dim: int, width: int, experts: int) -> None:
        super().__init__()
        self.project = normal_parameter(width, dim, std=fan_in_std(dim))
        self.weight = normal_parameter(experts, width, std=router_std(width))

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        cell, below = router_state.shared, router_state.hidden
        if not isinstance(cell, RecurrentRouterCell) or below is None:
            raise TypeError("a recurrent gate needs the state of its stack's RecurrentRouterCell")
        hidden = cell(x @ self.project.float().t(), hidden=below)
        return GateOutput(hidden @ self.weight.float().t(), replace(router_state, hidden=hidden))

    def initializers(self) -> Mapping[str, Initializer]:
        return {"project": Initializer(std=self.project.shape[1] ** -0.5)}


class DecoupledRouting(CrossLayerRouting):
    """Read-ME's decoupled router (2410.19123): one small transformer makes all layers' logits.

    One pre-norm block of ``heads`` attention heads and a SwiGLU feed-forward of twice its ``dim``
    reads the input of the stack (embeddings and positions; the paper's router has an embedding
    table of its own). Every MoE layer uses its logits; the layers have no gates. Its attention is
    causal in the decoder and bidirectional in the encoder; in decoding it has a KV cache of its
    own. Norms have no gains. Noise and balance apply in each layer. All MoE layers of a stack have
    the same number of experts.
    """

    dim: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "DecoupledRouting":
        if self.dim % (2 * self.heads):
            raise ValueError(f"heads={self.heads} of an even width to divide dim={self.dim}")
        return self

    def build_gate(self, _shape: RouterShape, /) -> nn.Module:
        return PrecomputedGate()

    def build_shared(self, shape: RouterShape, /) -> SharedRouter | None:
        return DecoupledRouter(self, shape)

    def shared_parameter_specs(self, shape: RouterShape, /) -> Sequence[ParameterSpec]:
        sizes = [
            (self.dim, shape.dim),
            (3 * self.dim, self.dim),
            (self.dim, self.dim),
            (4 * self.dim, self.dim),
            (self.dim, 2 * self.dim),
            (shape.experts, self.dim),
        ]
        return [ParameterSpec("router", size) for size in sizes]

    def state_widths(self, shape: RouterShape, /) -> RouterStateWidths:
        return RouterStateWidths(logits=shape.experts)

    def problems(self, experts: Sequence[int], router_input: RouterInput, /) -> str | None:
        if not isinstance(router_input, HiddenState):
            return "router_input=HiddenState, since no layer has a gate that could read it"
        return _unequal(experts)


class PrecomputedGate(nn.Module):
    """The gate of a layer whose logits the shared router has computed."""

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        del x
        if router_state.logits is None:
            raise TypeError("a decoupled layer needs the logits of its stack's DecoupledRouter")
        return GateOutput(router_state.logits, router_state)


class DecoupledRouter(SharedRouter, CustomInitializers):
    """The router transformer of a stack, without autocast."""

    def __init__(self, config: DecoupledRouting, shape: RouterShape) -> None:
        super().__init__()
        width = config.dim
        self.project = normal_parameter(width, shape.dim, std=fan_in_std(shape.dim))
        heads = AttentionConfig(heads=config.heads)
        self.attention = Attention().build(
            MixerShape(width, causal=shape.causal, attention=heads, position=Rotary())
        )
        feed = FeedForwardConfig(hidden=2 * width, activation=SwiGLU())
        self.feed_forward = DenseFeedForward(feed, dim=width, bias=False)
        self.weight = normal_parameter(shape.experts, width, std=router_std(width))

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(self.project.dtype) @ self.project.t()
            h = h + self.attention(
                _rms_norm(h), context=stack_input.mixing, state=stack_input.decode_state
            )
            h = h + self.feed_forward(_rms_norm(h))
            return RouterState(logits=_rms_norm(h).float() @ self.weight.float().t())

    def init_state(self, rows: int, /) -> DecodeState | None:
        return self.attention.init_state(rows, like=self.project)

    def initializers(self) -> Mapping[str, Initializer]:
        inner = {name: p for name, p in self.named_parameters() if name != "weight"}
        return {name: Initializer(std=p.shape[1] ** -0.5) for name, p in inner.items()}


def _rms_norm(h: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    return F.rms_norm(h, (h.shape[-1],))


def _unequal(experts: Sequence[int]) -> str | None:
    """Return what a stack needs whose layers pass logits on, if the numbers of experts differ."""
    return f"one number of experts in a stack, not {experts}" if len(set(experts)) > 1 else None
