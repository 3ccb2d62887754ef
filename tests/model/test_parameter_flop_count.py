"""Parameter and FLOP counts agree with built models and with torch's FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.samples import BASE, VARIANTS, VOCABULARY, full_batch
from moesaic.model.config import Stack
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.null_experts import ZeroExperts
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_exactly_in_total_and_by_kind(name):
    config = VARIANTS[name]
    model, counted = Transformer(config), count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    kinds = dict.fromkeys(counted.kinds, 0)
    for parameter, kind in model.parameter_kinds().items():
        kinds[kind] += model.get_parameter(parameter).numel()
    assert kinds == counted.kinds


def test_parts_add_up_and_active_counts_only_selected_experts():
    counted = count_parameters(BASE)
    assert sum(counted.parts.values()) == counted.total
    experts = counted.parts["encoder experts"] + counted.parts["decoder experts"]
    assert counted.active == counted.total - experts // 2  # 2 of 4
    dense = count_parameters(BASE.replace(moe=NoMoE()))
    assert dense.active == dense.total


@pytest.mark.parametrize("encoder", [0, 2])
def test_forward_flops_agree_with_torch(encoder):
    config = VARIANTS["dense"].replace(
        encoder=Stack(layers=encoder), feed_forward=FeedForwardConfig(hidden=24, activation=ReLU())
    )
    sizes = BatchDims(rows=3, source=7 if encoder else 0, target=5)
    source = torch.randint(5, VOCABULARY, (3, sizes.source))
    target = torch.randint(5, VOCABULARY, (3, sizes.target))
    model = Transformer(config)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.predict(model(full_batch(source, target)).hidden)
    heads = config.attention.heads * config.head_dim
    unseen = 4 * heads * config.decoder.layers * sizes.rows * (5 * 5 - 5 * 6 / 2)
    assert count_parameters(config).forward_flops(sizes) == counter.get_total_flops() - unseen


def test_experts_cost_as_much_as_the_selected_ones():
    sizes = BatchDims(rows=1, source=8, target=8)
    dense = count_parameters(BASE.replace(moe=NoMoE())).forward_flops(sizes)
    sparse = count_parameters(BASE).forward_flops(sizes)
    feed = 2 * (16 * 48 + 24 * 16)  # one SwiGLU feed-forward per token
    router = 2 * 16 * 4
    layers = {"encoder": 1, "decoder": 2}
    assert sparse - dense == sum(8 * n * (feed + router) for n in layers.values())


def test_what_every_expert_shares_is_multiplied_once_per_edge():
    sizes = BatchDims(rows=1, source=8, target=8)
    plain = count_parameters(BASE).forward_flops(sizes)
    rank, shared = 3, MoE(experts=4, select=TopK(k=2), expert=LoRAExpert(rank=3))
    low_rank = count_parameters(BASE.replace(moe=shared))
    change = 2 * rank * (16 + 48 + 24 + 16)  # two pairs of narrow matrices around a SwiGLU
    layers = {"encoder": 1, "decoder": 2}
    extra = sum(8 * n * 2 * change for n in layers.values())  # two edges per token
    assert low_rank.forward_flops(sizes) - plain == extra
    assert low_rank.total < count_parameters(BASE).total


def test_a_product_key_memory_counts_the_rows_that_it_reads():
    memory = ProductKeyMemory(keys_per_side=8, slots=6)
    counted = count_parameters(BASE.replace(moe=memory))
    tables = 3 * 64 * sum(memory.value_dims(16))  # in three layers
    assert counted.total - counted.active == tables - tables * 6 // 64


def test_training_costs_three_forward_passes():
    counted = count_parameters(BASE)
    assert counted.training_flops_per_token() == 3 * counted.flops_per_token()


def test_null_experts_reduce_the_active_parameters():
    whole = count_parameters(BASE)
    spared = count_parameters(
        BASE.replace(moe=BASE.moe.replace(null_experts=ZeroExperts(number=4)))
    )
    experts = whole.parts["encoder experts"] + whole.parts["decoder experts"]
    assert spared.parts["encoder experts"] == whole.parts["encoder experts"]
    assert spared.total - spared.active == experts * 3 // 4  # two of eight choices, four work
    assert whole.total - whole.active == experts // 2
