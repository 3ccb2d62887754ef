"""One decoupled router makes the logits of all layers of a stack."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, batch_for
from moesaic.core.errors import ConfigError
from moesaic.model.config import Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import DecoupledRouting
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_gate import HiddenStateAndTag

LINK = DecoupledRouting(dim=8, heads=2)
CONFIG = BASE.replace(
    moe=MoE(experts=4, select=TopK(k=2), cross_layer=LINK),
    encoder=Stack(layers=2, moe_every=1),
    decoder=Stack(layers=3, moe_every=1),
)


def logits_of(model, batch):
    return {record.layer: record.logits for record in model(batch).records}


def test_every_layer_of_a_stack_has_the_same_logits_and_none_has_a_gate():
    model = Transformer(CONFIG).eval()
    logits = logits_of(model, batch_for(CONFIG))
    assert not [name for name, _ in model.named_parameters() if ".router." in name]
    assert torch.equal(logits["encoder.0"], logits["encoder.1"])
    assert torch.equal(logits["decoder.0"], logits["decoder.1"])
    assert torch.equal(logits["decoder.0"], logits["decoder.2"])


def test_the_router_is_causal_in_the_decoder_and_bidirectional_in_the_encoder():
    model, batch = Transformer(CONFIG).eval(), batch_for(CONFIG)
    source, target = batch.source.values.clone(), batch.target.values.clone()
    source[1, 6] = target[3, 4] = 9 if source[1, 6] != 9 != target[3, 4] else 10
    before = logits_of(model, batch)
    after = logits_of(
        model,
        replace(
            batch,
            source=replace(batch.source, values=source),
            target=replace(batch.target, values=target),
        ),
    )
    moved = {name: (before[name] != after[name]).any(1).nonzero()[:, 0].tolist() for name in before}
    assert moved["encoder.0"] == list(range(2, 9))  # all seven tokens of row 1
    assert moved["decoder.0"] == [5 + 1 + 3 + 4, 5 + 1 + 3 + 5]  # positions 4 and 5 of row 3


def test_all_layers_give_the_router_a_gradient():
    model = Transformer(CONFIG)
    output = model(batch_for(CONFIG))
    (model.loss(output).total).backward()
    grads = [p.grad for p in model.decoder_routing.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_unsupported_configs_are_refused():
    with pytest.raises(ConfigError, match="DecoupledRouting expects one number of experts"):
        CONFIG.replace(decoder=Stack(layers=2, moe_every=1, experts_per_layer=(4, 8)))
    with pytest.raises(ConfigError, match="DecoupledRouting expects router_input=HiddenState"):
        CONFIG.replace(moe=CONFIG.moe.replace(router_input=HiddenStateAndTag()))
    with pytest.raises(ConfigError, match="heads=3"):
        DecoupledRouting(dim=8, heads=3)
