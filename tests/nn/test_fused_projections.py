"""Modules name the maps that one of their matrices holds."""

import pytest

from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.experts import LoRAExpert
from moesaic.nn.adapter import adapter_name
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.fused_projections import fused_outputs
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.sparse_adaptation import ExpertsOfLanguage, RandomSparse
from moesaic.testing.tiny_models import tiny_model_config


def test_every_fused_matrix_of_a_model_is_split_into_its_maps():
    config = tiny_model_config().replace(attention=AttentionConfig(heads=4, kv_heads=2))
    model = Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = fused_outputs(model)
    assert found == {
        "encoder.0.self_attention.inner.qkv.weight": (16, 8, 8),
        "encoder.0.feed_forward.inner.experts.up": (32, 32),
        "decoder.0.self_attention.inner.qkv.weight": (16, 8, 8),
        "decoder.0.cross_attention.inner.kv.weight": (8, 8),
        "decoder.0.feed_forward.inner.experts.up": (32, 32),
    }
    for name, widths in found.items():
        assert sum(widths) == shapes[name][0 if len(shapes[name]) == 2 else -1]


@pytest.mark.parametrize(
    ("choice", "part"),
    [
        (LoRA(rank=2), "b"),
        (ExpertsOfLanguage(language="x", experts={"encoder.0": (1,), "decoder.0": (0,)}), "delta"),
        (RandomSparse(), ""),
    ],
)
def test_adapters_are_fused_as_their_matrices_are(choice, part):
    model = Transformer(tiny_model_config())
    matrices = fused_outputs(model)
    choice.attach(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    own = {adapter_name(name, part): widths for name, widths in matrices.items()}
    found = {name: widths for name, widths in own.items() if name in shapes}
    assert fused_outputs(model) == matrices | found
    assert len(found) >= 2 or not part
    for name, widths in found.items():
        assert sum(widths) == shapes[name][0 if len(shapes[name]) == 2 else -1]


def test_only_gated_activations_have_two_maps():
    feed = FeedForwardConfig(hidden=32, activation=ReLU())
    moe = MoE(experts=4, expert=LoRAExpert(rank=2))
    assert not [
        n
        for n in fused_outputs(Transformer(tiny_model_config().replace(feed_forward=feed)))
        if "up" in n
    ]
    gated = fused_outputs(Transformer(tiny_model_config(moe=moe)))
    assert gated["encoder.0.feed_forward.inner.experts.up_b"] == (32, 32)
    assert gated["encoder.0.feed_forward.inner.experts.base.up.weight"] == (32, 32)
