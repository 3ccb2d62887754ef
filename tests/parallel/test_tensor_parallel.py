"""Tensor parallelism: what it cannot shard is refused; the loss of a table in unequal parts."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as distributed

from moesaic.core.errors import ConfigError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.qk_norm import AcrossHeadsQKNorm
from moesaic.ops.chunk_sizes import CPU_CHUNKS, use_chunk_sizes
from moesaic.ops.cross_entropy import cross_entropy
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.parallel.tensor_parallel import VocabParallelEmbedding
from moesaic.testing.tiny_models import tiny_model_config

MODEL = tiny_model_config()
REFUSED = {
    "has 2 heads": (MODEL, 4),
    "has 1 kv_heads": (MODEL.replace(attention=AttentionConfig(heads=2, kv_heads=1)), 2),
    "normalises .* all heads": (
        MODEL.replace(attention=AttentionConfig(heads=2, qk_norm=AcrossHeadsQKNorm())),
        2,
    ),
    "belong to attention experts.*set tensor to 1": (
        MODEL.replace(mixers={"attention": MixtureOfAttention()}),
        2,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_reason(why: str) -> None:
    config, ranks = REFUSED[why]
    plan = ParallelPlan(data=1, tensor=ranks)
    with pytest.raises(ConfigError, match=f"parallel.tensor={ranks}.*{why}"):
        check_parallel(Transformer(config), parallel=ParallelConfig(plan=plan), plan=plan)


def test_attention_experts_are_allowed_without_tensor_parallelism() -> None:
    config, plan = MODEL.replace(mixers={"attention": MixtureOfAttention()}), ParallelPlan(data=2)
    check_parallel(Transformer(config), parallel=ParallelConfig(plan=plan), plan=plan)


WORDS, SIZES = 37, (5, 0, 8)  # of which a rank has 12 or 13, and the labels of each rank
BUDGETS = (1, 4 * 13 * 4 - 1, 1 << 30)  # 1 token, 3 or 4 of another part of the table, all


def _loss_of_table(rank: int, budget: int, sizes: Sequence[int] = SIZES) -> list[torch.Tensor]:
    """Loss, each token's, and gradients with smoothing and z-loss: a rank's part, or all (-1)."""
    torch.manual_seed(0)
    hidden, table = torch.randn(sum(sizes), 8), torch.randn(WORDS, 8)
    label = torch.randint(WORDS, (sum(sizes),))
    with use_chunk_sizes(replace(CPU_CHUNKS, logits=budget, float32=min(budget, 1 << 20))):
        if rank < 0:
            inputs = hidden.requires_grad_(), table.requires_grad_()
            loss = cross_entropy(
                hidden, weight=table, label=label, label_smoothing=0.1, z_loss=0.01
            )
        else:
            rows = slice(WORDS * rank // len(sizes), WORDS * (rank + 1) // len(sizes))
            own = hidden.split(list(sizes))[rank].clone().requires_grad_()
            inputs = own, table[rows].clone().requires_grad_()
            backend = VocabParallelEmbedding(distributed.group.WORLD, size=WORDS)
            loss = backend.loss(
                own,
                table=inputs[1],
                label=label.split(list(sizes))[rank],
                smoothing=0.1,
                z=0.01,
                sizes=sizes,
            )
        grads = torch.autograd.grad(loss.total * 0.37, inputs)
    return [loss.total.detach()[None], loss.nll, *grads]


def _loss_on_rank() -> list[list[torch.Tensor]]:
    return [_loss_of_table(distributed.get_rank(), budget) for budget in BUDGETS]


def test_the_loss_of_a_table_in_unequal_parts_equals_that_of_the_whole_whatever_the_chunk() -> None:
    every = run_on_ranks(3, _loss_on_rank)
    for number, budget in enumerate(BUDGETS):
        parts = [rank[number] for rank in every]
        found = [torch.cat(of_ranks) for of_ranks in zip(*parts, strict=True)]
        found[0] = found[0].sum(0, keepdim=True)
        for got, want in zip(found, _loss_of_table(-1, budget), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
