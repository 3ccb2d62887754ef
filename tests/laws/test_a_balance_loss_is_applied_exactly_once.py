"""Law: a balance loss is added once per step: not per micro-batch, recomputation, rank or padding.

Ranks: ``test_data_parallel_ranks_give_the_same_loss.py``.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.samples import LINKED, padded
from moe.variants import BALANCES, balanced
from moesaic.distributed.world import SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import moe_layers
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import (
    LABELS,
    random_batch,
    tiny_model_config,
)
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import Objective

Found = dict[str, torch.Tensor]


CASES = {name: balanced(name) for name in BALANCES} | {
    name: MoE(experts=4, select=TopK(k=2), cross_layer=link) for name, link in LINKED.items()
}


def model_of(name: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny_model_config(moe=CASES[name], layers=2))


def step(model: Transformer, batches: list) -> tuple[Found, Found, list[torch.Tensor]]:
    """Return one step's loss terms, its gradients, and each router's accumulated stats."""
    objective = Objective(LossCategories(LABELS), precision=Float32())
    seen = objective.forward_backward(
        parallelize(model, parallel=ParallelConfig(), world=SingleProcess()), batches=batches
    )
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return (
        dict(seen.sums.terms),
        grads,
        [layer.router.stats_sum.clone() for layer in moe_layers(model)],
    )


def agree(here: Found, there: Found) -> None:
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_given_four_times_in_one_step_counts_once(name):
    batch = random_batch(6, seed=1)
    terms, grads, stats = step(model_of(name), [batch])
    again_terms, again_grads, again_stats = step(model_of(name), 4 * [batch])
    assert any(key.startswith("loss_") for key in terms)
    agree(terms, again_terms)
    agree(grads, again_grads)
    for once, four in zip(stats, again_stats, strict=True):
        torch.testing.assert_close(four, 4 * once)


@pytest.mark.parametrize("name", CASES)
def test_recomputing_activations_changes_no_loss_no_gradient_and_no_counter(name):
    batches = [random_batch(6, seed=seed) for seed in (1, 2)]
    plain = step(model_of(name), batches)
    model = model_of(name)
    for block in [*model.encoder, *model.decoder]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    terms, grads, stats = step(model, batches)
    agree(plain[0], terms)
    agree(plain[1], grads)
    assert all(map(torch.equal, plain[2], stats))


@pytest.mark.parametrize("name", CASES)
def test_padding_is_never_counted(name):
    batch = random_batch(6, seed=3)
    terms, grads, stats = step(model_of(name), [batch])
    loose_terms, loose_grads, loose_stats = step(model_of(name), [padded(batch, 5)])
    agree(terms, loose_terms)
    agree(grads, loose_grads)
    for here, there in zip(stats, loose_stats, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-4)
