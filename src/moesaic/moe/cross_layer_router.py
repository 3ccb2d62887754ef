"""PreGatedRouting: each MoE layer's router chooses for the one above, so experts can be fetched ahead.

Letters: T tokens, C what a gate reads, E experts.

Recurrent: routers that remember, token by token, what those of the layers below saw.

Letters: T tokens, C what a gate reads, P width of the state, E experts.

Decoupled: one router per stack, which decides for all its layers before the first one runs.

Letters: T tokens, D model dim, W router dim, E experts, B rows, n newest tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.parameter_spec import ParameterSpec
from moesaic.moe.router_context import RouterState
from moesaic.moe.router_logits import (
    CrossLayerRouting,
    GateOutput,
    HiddenState,
    LayerIndex,
    RouterInput,
    RouterStateWidths,
    SharedRouter,
    StackInput,
)
from moesaic.nn.attention import AttentionConfig, SelfAttention
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig, SwiGLU
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.positional_encoding import Rotary


class PreGatedRouting(CrossLayerRouting):
    """Pre-gated MoE (2308.12066): layer l decides for layer l + 1, from what it reads itself.

    The first MoE layer of a stack has two gates, its own and that of the next; the last has none.
    Noise, selection, limits and balance stay where the logits are used. All MoE layers of a stack
    have the same number of experts.
    """

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        return PreGate(dim=dim, experts=experts, layer_index=layer_index)

    def gate_parameter_specs(
        self, *, dim: int, experts: int, layer_index: LayerIndex
    ) -> Sequence[ParameterSpec]:
        gates = (layer_index.index == 0) + (layer_index.index + 1 < layer_index.count)
        return (ParameterSpec("router", (experts, dim)),) * gates

    def state_widths(self, *, experts: int) -> RouterStateWidths:
        return RouterStateWidths(logits=experts)

    def saved_activations(self, *, dim: int, layer_index: LayerIndex) -> int:
        return 0 if self.gate_parameter_specs(dim=dim, experts=1, layer_index=layer_index) else -dim

    def problems(self, *, experts: Sequence[int], router_input: RouterInput) -> str | None:
        del router_input
        return f"one number of experts in a stack, not {experts}" if len(set(experts)) > 1 else None


class PreGate(nn.Module):
    """``weight`` is the gate of this layer, ``ahead`` that of the next, where there are such."""

    def __init__(self, *, dim: int, experts: int, layer_index: LayerIndex) -> None:
        super().__init__()
        first, last = layer_index.index == 0, layer_index.index + 1 == layer_index.count
        self.weight = nn.Parameter(torch.empty(experts, dim)) if first else None
        self.ahead = None if last else nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        logits = router_state.logits if self.weight is None else x @ self.weight.float().t()
        if logits is None:
            raise TypeError("a pre-gated layer needs the logits that the layer below made for it")
        ahead = None if self.ahead is None else x @ self.ahead.float().t()
        return GateOutput(logits, replace(router_state, logits=ahead))


class RecurrentRouting(CrossLayerRouting):
    """RMoE, the layerwise recurrent router (2408.06793): a GRU over the MoE layers of a stack.

    Each layer projects what it reads to ``width`` numbers; one cell, shared by all layers, turns
    them and the token's state from the layer below into its new state, of which the layer's own
    matrix makes logits. Gradients flow through the state to all layers below. The first layer's
    state comes from zeros. Encoder and decoder have a cell each.
    """

    shared_every_layer: ClassVar[bool] = True
    width: int = Field(default=128, ge=1)

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        del layer_index
        return RecurrentGate(dim=dim, width=self.width, experts=experts)

    def gate_parameter_specs(
        self, *, dim: int, experts: int, layer_index: LayerIndex
    ) -> Sequence[ParameterSpec]:
        del layer_index
        return (
            ParameterSpec("router", (self.width, dim)),
            ParameterSpec("router", (experts, self.width)),
        )

    def build_shared(self, *, dim: int, experts: int, causal: bool) -> SharedRouter | None:
        del dim, experts, causal
        return RecurrentRouterCell(self.width)

    def shared_parameter_specs(self, *, dim: int, experts: int) -> Sequence[ParameterSpec]:
        del dim, experts
        matrix, bias = (
            ParameterSpec("router", (3 * self.width, self.width)),
            ParameterSpec("bias", (3 * self.width,)),
        )
        return (matrix, matrix, bias, bias)

    def state_widths(self, *, experts: int) -> RouterStateWidths:
        del experts
        return RouterStateWidths(hidden=self.width)

    def saved_activations(self, *, dim: int, layer_index: LayerIndex) -> int:
        del dim, layer_index
        return 8 * self.width


class RecurrentRouterCell(SharedRouter, CustomInitializers):
    """The GRU cell of a stack, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(width, width)

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        del stack_input
        none = torch.zeros(x.shape[0], self.width, device=x.device)
        return RouterState(hidden=none, shared=self)

    def forward(
        self, x: Float[Tensor, "T P"], *, hidden: Float[Tensor, "T P"]
    ) -> Float[Tensor, "T P"]:
        """Return the states after a layer."""
        cell = self.cell
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        return torch.gru_cell(x, hidden, *(weight.float() for weight in weights))

    def initializers(self) -> Mapping[str, Initializer]:
        inner, bias = Initializer(std=self.width**-0.5), Initializer(kind="bias")
        return {
            "cell.weight_ih": inner,
            "cell.weight_hh": inner,
            "cell.bias_ih": bias,
            "cell.bias_hh": bias,
        }


class RecurrentGate(CustomInitializers):
    """One layer's projection into the cell, and its logits out of it."""

    def __init__(self, *, dim: int, width: int, experts: int) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.empty(width, dim))
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Float[Tensor, "T C"], *, router_state: RouterState) -> GateOutput:
        cell, below = router_state.shared, router_state.hidden
        if not isinstance(cell, RecurrentRouterCell) or below is None:
            raise TypeError("a recurrent gate needs the carry of its stack's RecurrentRouterCell")
        hidden = cell(x @ self.project.float().t(), hidden=below)
        return GateOutput(hidden @ self.weight.float().t(), replace(router_state, hidden=hidden))

    def initializers(self) -> Mapping[str, Initializer]:
        return {"project": Initializer(std=self.project.shape[1] ** -0.5)}


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

    def gate_parameter_specs(
        self, *, dim: int, experts: int, layer_index: LayerIndex
    ) -> Sequence[ParameterSpec]:
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
            return "router_input=HiddenState, since no layer has a gate that could read it"
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
            return self.attention(
                h, packing=stack_input.packing, rotation=rotation, causal=self.causal
            )
        return self.attention.step(
            h,
            packing=stack_input.packing,
            rotation=rotation,
            cache=past.cache,
            position=past.position,
        )


def _rms_norm(h: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    return F.rms_norm(h, (h.shape[-1],))
