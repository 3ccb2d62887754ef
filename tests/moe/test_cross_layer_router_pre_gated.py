"""Each layer computes the next one's logits: the first has two gates, the last none."""

import pytest
import torch

from model.samples import BASE, batch_for
from moesaic.core.errors import ConfigError
from moesaic.model.config import Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import PreGatedRouting
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import moe_layers

CONFIG = BASE.replace(
    moe=MoE(experts=4, select=TopK(k=2), cross_layer=PreGatedRouting()),
    decoder=Stack(layers=3, moe_every=1),
)


def test_the_first_has_two_gates_the_last_none_and_an_only_one_its_own():
    names = [name for name, _ in Transformer(CONFIG).named_parameters() if ".router." in name]
    inner = "feed_forward.inner.router.gate"
    assert names == [
        f"encoder.1.{inner}.weight",
        f"decoder.0.{inner}.weight",
        f"decoder.0.{inner}.ahead",
        f"decoder.1.{inner}.ahead",
    ]


def test_a_layers_logits_come_from_the_layer_below():
    model, reads = Transformer(CONFIG).eval(), {}
    for layer in moe_layers(model):
        layer.router.register_forward_pre_hook(
            lambda _, args, name=layer.name: reads.update({name: args[0]})
        )
    logits = {record.layer: record.logits for record in model(batch_for(CONFIG)).records}
    gates = {layer.name: layer.router.gate for layer in moe_layers(model)}
    for below, above in (("decoder.0", "decoder.1"), ("decoder.1", "decoder.2")):
        want = reads[below] @ gates[below].ahead.t()
        torch.testing.assert_close(logits[above], want)
    torch.testing.assert_close(
        logits["decoder.0"], reads["decoder.0"] @ gates["decoder.0"].weight.t()
    )


def test_layers_with_different_numbers_of_experts_are_refused():
    with pytest.raises(
        ConfigError, match=r"PreGatedRouting expects one number of experts .* \(4, 8\)"
    ):
        CONFIG.replace(decoder=Stack(layers=2, moe_every=1, experts_per_layer=(4, 8)))
