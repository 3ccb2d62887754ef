"""PreGated: each MoE layer's router chooses for the one above, so experts can be fetched ahead.

Letters: T tokens, C what a gate reads, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import RouterState
from moesaic.moe.gates import RouterInput, RouterStateWidths, CrossLayerRouting, LayerIndex, GateOutput
from moesaic.moe.pieces import ParameterSpec


class PreGatedRouting(CrossLayerRouting):
    """Pre-gated MoE (2308.12066): layer l decides for layer l + 1, from what it reads itself.

    The first MoE layer of a stack has two gates, its own and that of the next; the last has none.
    Noise, selection, limits and balance stay where the logits are used. All MoE layers of a stack
    have the same number of experts.
    """

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        return PreGate(dim=dim, experts=experts, layer_index=layer_index)

    def gate_parameter_specs(self, *, dim: int, experts: int, layer_index: LayerIndex) -> Sequence[ParameterSpec]:
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
