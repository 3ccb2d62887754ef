"""Recurrent: routers that remember, token by token, what those of the layers below saw.

Letters: T tokens, C what a gate reads, P width of the state, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import RouterState
from moesaic.moe.gates import RouterStateWidths, CrossLayerRouting, LayerIndex, GateOutput, SharedRouter, StackInput
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.start import CustomInitializers, Initializer


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

    def gate_parameter_specs(self, *, dim: int, experts: int, layer_index: LayerIndex) -> Sequence[ParameterSpec]:
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
            raise TypeError("a recurrent gate needs the carry of its stack's RecurrentCell")
        hidden = cell(x @ self.project.float().t(), hidden=below)
        return GateOutput(hidden @ self.weight.float().t(), replace(router_state, hidden=hidden))

    def initializers(self) -> Mapping[str, Initializer]:
        return {"project": Initializer(std=self.project.shape[1] ** -0.5)}
