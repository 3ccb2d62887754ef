"""ModelConfig refuses shapes that do not fit, reads and writes YAML, and defines the model."""

import pytest
import torch

from model.samples import BASE, VARIANTS
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.layer import MoELayer
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_round_trips_through_yaml(name):
    config = VARIANTS[name]
    assert ModelConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": AttentionConfig(heads=3)}, "heads=3"),
        ({"attention": AttentionConfig(heads=4, kv_heads=3)}, "kv_heads=3"),
        ({"attention": AttentionConfig(heads=4, head_dim=3)}, "even"),
        ({"decoder": Stack(layers=0)}, "decoder.layers"),
        ({"moe": MoE(experts=2, select=TopK(k=3))}, "experts=2"),
        (
            {
                "moe": ProductKeyMemory(),
                "decoder": Stack(layers=2, moe_every=1, experts_per_layer=(2, 4)),
            },
            "ProductKeyMemory",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_its_numbers(changes, message):
    with pytest.raises(ConfigError, match=message):
        BASE.replace(**changes)


def test_every_kth_block_has_experts():
    stack = Stack(layers=6, moe_every=3)
    assert [i for i in range(6) if BASE.routed_moe_of_layer(stack, layer=i)] == [2, 5]
    assert not any(
        BASE.routed_moe_of_layer(Stack(layers=6, moe_every=0), layer=i) for i in range(6)
    )
    assert not any(BASE.replace(moe=NoMoE()).routed_moe_of_layer(stack, layer=i) for i in range(6))


def test_a_pyramid_gives_each_moe_layer_its_own_number_of_experts():
    pyramid = Stack(layers=4, moe_every=2, experts_per_layer=(2, 8))
    config = BASE.replace(encoder=pyramid, moe=MoE(experts=3, select=SwitchTop1()))
    counts = [config.routed_moe_of_layer(pyramid, layer=layer) for layer in range(4)]
    assert [moe.experts if moe else 0 for moe in counts] == [0, 2, 0, 8]
    assert count_parameters(config).total == sum(
        p.numel() for p in Transformer(config).parameters()
    )


def test_the_first_blocks_may_stay_dense():
    stack = Stack(layers=6, moe_every=2, first_dense_layers=3)
    assert stack.moe_layers == (3, 5)
    config = BASE.replace(
        decoder=Stack(layers=4, moe_every=1, first_dense_layers=2, experts_per_layer=(2, 5))
    )
    counts = [config.routed_moe_of_layer(config.decoder, layer=layer) for layer in range(4)]
    assert [moe.experts if moe else 0 for moe in counts] == [0, 0, 2, 5]
    assert count_parameters(config).total == sum(
        p.numel() for p in Transformer(config).parameters()
    )


def test_any_blocks_may_be_listed_as_sparse():
    stack = Stack(layers=5, sparse_layers=(0, 3, 4))
    assert stack.moe_layers == (0, 3, 4)
    assert Stack(layers=2, sparse_layers=()).moe_layers == ()
    for wrong in (
        {"sparse_layers": (3, 0)},
        {"sparse_layers": (1, 1)},
        {"sparse_layers": (5,)},
        {"sparse_layers": (1,), "first_dense_layers": 1},
        {"sparse_layers": (1,), "pattern": "attention, attention-"},
    ):
        with pytest.raises(ConfigError, match=r"sparse_layers=.* in order"):
            Stack(layers=5, **wrong)


def test_a_product_key_memory_replaces_the_experts_of_a_block():
    config = BASE.replace(moe=ProductKeyMemory(keys_per_side=4, slots=2))
    assert config.moe_of_layer(config.encoder, layer=1) == config.moe
    assert config.moe_of_layer(config.encoder, layer=0) == NoMoE()
    assert config.routed_moe_of_layer(config.encoder, layer=1) is None


def test_a_pyramid_of_the_wrong_height_is_refused():
    with pytest.raises(ConfigError, match="2 MoE layers"):
        Stack(layers=4, moe_every=2, experts_per_layer=(2, 4, 8))


def test_building_twice_from_one_seed_gives_one_model():
    first, second = (torch.manual_seed(3) and Transformer(BASE) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moe_layers_are_in_the_blocks_of_the_config():
    names = [m.name for m in Transformer(BASE).modules() if isinstance(m, MoELayer)]
    assert names == ["encoder.1", "decoder.0", "decoder.1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["attention.window=SlidingWindow(size=0)"], "found 0, expected at least 1"),
        (["position=Rotary(fraction=0.3)"], "an even number of channels to rotate, not 1"),
        (["position=RelativeBias(buckets=6)"], "buckets that 4 divides"),
        (["attention.bias=[query, values]"], 'found "values"'),
        (["mixers.latent={kind: LatentAttention, rope_dim: 3}"], "rope_dim"),
        (["mixers.latent={kind: LatentAttention, value_dim: 500}"], "value_dim=500 of at most"),
        (
            ["position=RelativeBias", "mixers.latent={kind: Attention, heads: 2}"],
            "whose table RelativeBias shares",
        ),
    ],
    ids=str,
)
def test_wrong_parts_of_attention_are_refused(changes, message):
    config = BASE.replace(mixers={"latent": Attention()}).override(
        ["decoder.pattern=attention, latent"]
    )
    with pytest.raises(ConfigError, match=message):
        config.override(changes)
