"""The recurrent router is a GRU over layers with gradients through its state."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, batch_for
from moesaic.model.config import Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import moe_layers
from moesaic.moe.router_gate import LayerIndex, RouterShape, StackInput
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext

T, D, P, E, LAYERS = 7, 10, 4, 5, 3


def stack():
    """A shared cell, a gate per layer, and what each layer reads."""
    link = RecurrentRouting(width=P)
    cell = link.build_shared(RouterShape(D, E, causal=True))
    gates = [link.build_gate(RouterShape(D, E, LayerIndex("x", i, LAYERS))) for i in range(LAYERS)]
    for module in [cell, *gates]:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return cell, gates, torch.randn(LAYERS, T, D, requires_grad=True)


def logits_of(cell, gates, reads, *, detach=False):
    packing = Packing.from_mask(torch.ones(1, T, dtype=torch.bool))
    carry, found = (
        cell.initial_state(
            reads[0], stack_input=StackInput(MixerContext.of_rows(packing, causal=False))
        ),
        [],
    )
    for gate, x in zip(gates, reads, strict=True):
        scored = gate(x, router_state=carry)
        carry = scored.router_state
        if detach:
            carry = replace(carry, hidden=carry.hidden.detach())
        found.append(scored.logits)
    return found


def by_hand(cell, gates, reads):
    w, h = cell.cell, torch.zeros(T, P)
    for gate, x in zip(gates, reads, strict=True):
        i_r, i_z, i_n = (x @ gate.project.t() @ w.weight_ih.t() + w.bias_ih).chunk(3, -1)
        h_r, h_z, h_n = (h @ w.weight_hh.t() + w.bias_hh).chunk(3, -1)
        z = (i_z + h_z).sigmoid()
        h = (1 - z) * (i_n + (i_r + h_r).sigmoid() * h_n).tanh() + z * h
        yield h @ gate.weight.t()


def test_logits_are_those_of_a_gru_over_layers_with_gradients():
    cell, gates, reads = stack()
    leaves = [reads, *cell.parameters(), *(p for gate in gates for p in gate.parameters())]
    grads = []
    for found in (logits_of(cell, gates, reads), list(by_hand(cell, gates, reads))):
        total = torch.stack(found)
        grads.append([total.detach(), *torch.autograd.grad(total.square().sum(), leaves)])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_first_projection_through_the_state():
    cell, gates, reads = stack()
    first = gates[0].project
    flows = logits_of(cell, gates, reads)[-1].sum()
    assert torch.autograd.grad(flows, first)[0].abs().sum() > 0
    cut = logits_of(cell, gates, reads, detach=True)[-1].sum()
    assert torch.autograd.grad(cut, first, allow_unused=True)[0] is None


def test_the_layers_of_a_stack_share_one_cell_and_stacks_do_not():
    moe = MoE(experts=4, select=TopK(k=2), cross_layer=RecurrentRouting(width=6))
    model = Transformer(BASE.replace(moe=moe, decoder=Stack(layers=3, moe_every=1)))
    cells = [name for name, _ in model.named_parameters() if name.endswith("cell.weight_ih")]
    assert cells == ["encoder_routing.cell.weight_ih", "decoder_routing.cell.weight_ih"]
    model.eval()(batch_for(BASE))
    assert len(list(moe_layers(model))) == 4


def test_a_gate_without_its_shared_cell_raises_an_error():
    cell, gates, reads = stack()
    carry = cell.initial_state(reads[0], stack_input=None)
    with pytest.raises(TypeError, match="RecurrentRouterCell"):
        gates[0](reads[0], router_state=replace(carry, shared=None))
