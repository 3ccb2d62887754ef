"""Law: a few steps of training reduce the loss, for every kind of expert and MoE layer."""

import pytest
import torch

from model.samples import LAYER_PARTS
from moesaic.distributed.world import SingleProcess
from moesaic.model.block_layout import ParallelResidual, SequentialResidual
from moesaic.model.config import Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.optim.master_weights import StochasticRounding
from moesaic.optim.optimizer import AdamW, Muon, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import BFloat16, BFloat16Autocast, Float32, Precision
from moesaic.testing.tiny_models import random_batch, tiny_model_config

STEPS = 5


def _losses(model: Transformer, *, optimizer: Optimizer, precision: Precision) -> list[float]:
    batch = random_batch(6, seed=1)
    parallelize(model, parallel=ParallelConfig(), world=SingleProcess(), precision=precision)
    built = optimizer.build(
        model.named_parameters(),
        kinds=model.parameter_kinds(),
        master_weights=precision.master_weights,
    )
    losses = []
    for _ in range(STEPS):
        with precision.autocast(batch.source.device):
            output = model(batch)
            loss = model.loss(output).total / batch.num_predicted
        terms = [term for record in output.records for term in record.losses.values()]
        (loss + sum(terms)).backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        built.step()
        built.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("decoder_only", [False, True], ids=["translator", "language-model"])
@pytest.mark.parametrize("layer", LAYER_PARTS)
def test_every_moe_layer_trains(layer, decoder_only):
    config = tiny_model_config(moe=LAYER_PARTS[layer])
    model = Transformer(config.replace(encoder=Stack(layers=0)) if decoder_only else config)
    losses = _losses(model, optimizer=AdamW(lr=0.01), precision=Float32())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("block", [SequentialResidual(), ParallelResidual()], ids=repr)
@pytest.mark.parametrize("keys", ["own", "shared"])
def test_attention_experts_train(keys, block):
    experts = MixtureOfAttention(experts=3, key_values=keys)
    model = Transformer(
        tiny_model_config().replace(mixers={"attention": experts}, block_layout=block)
    )
    before = model.decoder[0].self_attention.inner.gate.weight.detach().clone()
    losses = _losses(model, optimizer=Muon(lr=0.01), precision=Float32())
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(model.decoder[0].self_attention.inner.gate.weight, before)


@pytest.mark.parametrize("layer", LAYER_PARTS)
def test_every_moe_layer_trains_in_half_precision_with_muon(layer):
    for precision in (BFloat16Autocast(), BFloat16(master=StochasticRounding())):
        model = Transformer(tiny_model_config(moe=LAYER_PARTS[layer]))
        losses = _losses(model, optimizer=Muon(lr=0.01), precision=precision)
        assert losses[-1] < losses[0] - 0.1
