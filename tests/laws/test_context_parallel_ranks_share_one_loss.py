"""Law: ranks that hold slices of the same rows share one loss, one gradient and one routing."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from mixer_cases import MIXERS
from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.auxiliary_losses import RouterZLoss, SequenceBalance, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import DecoupledRouting
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_gate import HiddenStateAndTag
from moesaic.moe.shared_experts import GatedSharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReGLU
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import AcrossHeadsQKNorm
from moesaic.nn.rotary_scaling import LongRoPE
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import Ring
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.sharding_plan import slice_local
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.verify.synthetic_batches import shard_batch

CAPPED = MoE(
    experts=4,
    select=TopK(k=2),
    limit=Capacity(factor=0.7, minimum=0, priority=RandomPriority()),
    balance=(SwitchBalance(), RouterZLoss(), SequenceBalance(weight=0.1)),
    shared_experts=GatedSharedExperts(),
)


RECURRENCES = ("gated_linear_attention", "mamba2")


def _model(moe: MoE) -> ModelConfig:
    heads = AttentionConfig(heads=4, kv_heads=2)
    return tiny_model_config(moe=moe, layers=2).replace(attention=heads, dropout=0.2)


MODELS = {
    "encoder-decoder": _model(CAPPED).replace(
        feed_forward=FeedForwardConfig(hidden=32, activation=ReGLU())
    ),
    "decoder": _model(CAPPED).replace(encoder=Stack(layers=0)),
    "decoupled": _model(CAPPED.replace(cross_layer=DecoupledRouting(dim=8, heads=4))).replace(
        attention=AttentionConfig(heads=4, kv_heads=2, qk_norm=AcrossHeadsQKNorm()),
        position=Rotary(
            scaling=LongRoPE(
                factor=2, original_length=4, short_factors=(1.0, 1.5), long_factors=(1.3, 2.0)
            )
        ),
    ),
    "attention experts": _model(CAPPED.replace(router_input=HiddenStateAndTag())).replace(
        mixers={"attention": MixtureOfAttention()}
    ),
    "recurrences": _model(CAPPED).replace(
        mixers={name: MIXERS[name] for name in RECURRENCES},
        encoder=Stack(layers=0),
        decoder=Stack(layers=2, pattern=", ".join(RECURRENCES)),
    ),
}
PLANS = {
    "ulysses and experts": ParallelConfig(plan=ParallelPlan(context=2, expert=2)),
    "ring and experts": ParallelConfig(
        plan=ParallelPlan(context=2, expert=2), context_parallel=Ring()
    ),
    "ring of 4": ParallelConfig(plan=ParallelPlan(context=4), context_parallel=Ring()),
    "ulysses of 4": ParallelConfig(plan=ParallelPlan(context=4)),
    "data and ring": ParallelConfig(plan=ParallelPlan(context=2, data=2), context_parallel=Ring()),
    "tensor, ulysses and experts": ParallelConfig(plan=ParallelPlan(context=2, tensor=2, expert=4)),
}
ROWS = {"many rows": (5, 9), "one long row": (1, 40)}
FEW = [("encoder-decoder", "many rows"), ("decoder", "one long row")]
CASES = [
    *FEW,
    ("decoder", "many rows"),
    ("recurrences", "one long row"),
    *((model, "many rows") for model in list(MODELS)[2:]),
]


def _cases(parallel: ParallelConfig) -> list[tuple[str, str]]:
    return CASES if parallel.plan.world_size == 2 else FEW


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses and gradients by name, and (row, position, expert) of every edge by layer."""

    losses: dict[str, float]
    grads: dict[str, Tensor]
    edges: dict[str, Tensor]


def _batch(case: tuple[str, str]) -> Batch:
    rows, length = ROWS[case[1]]
    batch = random_batch(rows, seed=3, length=length)
    return (
        replace(batch, source=InputRows.empty(rows))
        if not MODELS[case[0]].encoder.layers
        else batch
    )


def _build(case: tuple[str, str]) -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODELS[case[0]])


def _pass(model: Transformer, batch: Batch, *, predicted: int) -> Outcome:
    output = model(batch)
    terms = {"cross_entropy": model.loss(output).total / predicted}
    edges = {}
    for record in output.records:
        for name, value in record.losses.items():
            terms[name] = terms.get(name, 0.0) + value
        context, routing = record.context, record.routing
        places = torch.stack([context.row_key, context.position], 1)[routing.token]
        edges[record.layer] = torch.cat([places, routing.expert[:, None]], 1)
    torch.stack(list(terms.values())).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome({n: float(v.detach()) for n, v in terms.items()}, grads, edges)


@cache
def _single_process(case: tuple[str, str]) -> Outcome:
    batch = _batch(case)
    return _pass(_build(case), batch, predicted=batch.num_predicted)


def _on_ranks(parallel: ParallelConfig) -> list[Outcome]:
    """Return each case's outcome; gradients are compared on the rank, with its slices."""
    outcomes = []
    for case in _cases(parallel):
        model, batch = _build(case), _batch(case)
        parallel_model = parallelize(model, parallel=parallel, world=ProcessGroupWorld())
        local = shard_batch(
            batch, rank=parallel_model.data_world.rank, world_size=parallel_model.data_world.size
        )
        outcome = _pass(model, local, predicted=batch.num_predicted)
        parallel_model.sum_gradients()
        for name, grad in _single_process(case).grads.items():
            part = slice_local(grad, parallel_model.local_spans(name))
            torch.testing.assert_close(outcome.grads[name], part, rtol=2e-4, atol=1e-6, msg=name)
        outcomes.append(replace(outcome, grads={}))
    return outcomes


@pytest.mark.parametrize("name", PLANS)
def test_context_parallel_ranks_share_one_loss(name: str) -> None:
    parallel = PLANS[name]
    for case in _cases(parallel):
        _single_process(case)  # cached before ranks fork
    results = run_on_ranks(parallel.plan.world_size, _on_ranks, parallel)
    for number, case in enumerate(_cases(parallel)):
        expected, ranks = _single_process(case), [rank[number] for rank in results]
        for loss, value in expected.losses.items():
            assert sum(r.losses[loss] for r in ranks) == pytest.approx(value, rel=1e-5), case
        for layer, edges in expected.edges.items():
            joined = torch.cat([rank.edges[layer] for rank in ranks])
            assert sorted(joined.tolist()) == sorted(edges.tolist()), (case, layer)
            assert CAPPED.experts in edges[:, 2], "nothing was dropped"
