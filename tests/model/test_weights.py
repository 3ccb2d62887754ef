"""Weights are initialized from the distributions of ``InitConfig``."""

import pytest
import torch

from model.samples import VARIANTS
from moesaic.model.config import InitConfig, ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.shared_experts import ResidualExpert
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.norm import LayerNorm

DIM, HIDDEN = 64, 96
CONFIG = ModelConfig(
    vocab_size=512,
    dim=DIM,
    encoder=Stack(layers=2),
    decoder=Stack(layers=2),
    attention=AttentionConfig(heads=4),
    feed_forward=FeedForwardConfig(hidden=HIDDEN),
    moe=MoE(experts=16),
    norm=LayerNorm(bias=True),
    bias=True,
)
WANTED = {
    "embedding.weight": DIM**-0.5,
    "encoder.0.self_attention.inner.qkv.weight": DIM**-0.5,
    "encoder.0.self_attention.inner.out.weight": DIM**-0.5 / 4**0.5,
    "encoder.0.feed_forward.inner.down.weight": HIDDEN**-0.5 / 4**0.5,
    "encoder.1.feed_forward.inner.router.gate.weight": (0.1 / DIM) ** 0.5,
    "encoder.1.feed_forward.inner.experts.up": DIM**-0.5,
    "encoder.1.feed_forward.inner.experts.down": HIDDEN**-0.5 / 4**0.5,
    "decoder.1.cross_attention.inner.kv.weight": DIM**-0.5,
    "decoder.1.cross_attention.inner.out.weight": DIM**-0.5 / 6**0.5,
    "decoder.1.feed_forward.inner.experts.down": HIDDEN**-0.5 / 6**0.5,
}


def test_every_kind_is_initialized_with_its_standard_deviation():
    model = Transformer(CONFIG)
    for name, std in WANTED.items():
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(std, rel=0.08), name


def test_gains_start_at_one_and_biases_at_zero():
    model = Transformer(CONFIG)
    for name, kind in model.parameter_kinds().items():
        if kind in ("norm", "bias"):
            assert (model.get_parameter(name) == (kind == "norm")).all(), name


def test_configured_standard_deviations_are_used():
    init = InitConfig(std=0.02, embedding_std=0.3, router_std=0.5, scale_by_depth=False)
    model = Transformer(CONFIG.replace(init=init))
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    for name, std in (("router.gate.weight", 0.5), ("experts.down", 0.02), ("experts.up", 0.02)):
        found = model.get_parameter(f"encoder.1.feed_forward.inner.{name}")
        assert float(found.detach().std()) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_kind_that_fits_its_shape(name):
    model = Transformer(VARIANTS[name])
    kinds = model.parameter_kinds()
    assert list(kinds) == [n for n, _ in model.named_parameters()]
    dims = {"embedding": (2,), "norm": (1,), "matrix": (2,), "expert": (2, 3), "router": (2,)}
    for parameter, kind in kinds.items():
        assert model.get_parameter(parameter).dim() in dims.get(kind, (1, 2)), parameter


def test_a_new_model_predicts_a_nearly_uniform_distribution():
    model = Transformer(CONFIG)
    hidden = model.decoder_norm(torch.randn(50, DIM))
    entropy = torch.distributions.Categorical(logits=model.predict(hidden)).entropy().mean()
    assert entropy > 0.85 * torch.log(torch.tensor(512.0))


def test_a_new_memory_output_has_the_scale_of_the_feed_forward():
    config = CONFIG.replace(moe=ProductKeyMemory(keys_per_side=64, slots=16))
    layer = Transformer(config).encoder[1].feed_forward.inner
    with torch.no_grad():
        x = torch.randn(400, DIM)
        loud = float(layer.read_memory(x).std() / layer.feed_forward(x).std())
    assert 0.6 < loud < 1.4


def test_custom_initializers_override_the_config():
    moe = MoE(experts=4, expert=LoRAExpert(rank=8), shared_experts=ResidualExpert())
    model = Transformer(CONFIG.replace(moe=moe))
    kinds = model.parameter_kinds()
    inner = "encoder.1.feed_forward.inner."
    assert not model.get_parameter(inner + "experts.up_b").any()
    up = model.get_parameter(inner + "experts.up_a").detach()
    assert float(up.std()) == pytest.approx(DIM**-0.5, rel=0.1)
    assert kinds[inner + "shared_experts.coefficient.weight"] == "router"
