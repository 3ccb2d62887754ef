"""Law: gradient accumulation over micro-batches equals one large batch, token by token."""

import pytest
import torch

from head_cases import HEADS, head_batch
from head_cases import LABELS as HEAD_LABELS
from moesaic.data.batch import Batch, InputRows
from moesaic.distributed.world import SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_selection import TopK
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import (
    LABELS,
    random_batch,
    tiny_model_config,
)
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import ForwardBackwardResult, Objective


def _joined(batches: list[Batch]) -> Batch:
    return Batch(
        source=_stacked([batch.source for batch in batches]),
        target=_stacked([batch.target for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        groups={
            name: torch.cat([batch.groups[name] for batch in batches]) for name in batches[0].groups
        },
        key=torch.cat([batch.key for batch in batches]),
    )


def _stacked(rows: list[InputRows]) -> InputRows:
    return InputRows(torch.cat([r.values for r in rows]), torch.cat([r.lengths for r in rows]))


def _gradients(
    batches: list[Batch], moe: SparseLayer
) -> tuple[ForwardBackwardResult, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(tiny_model_config(moe=moe))
    objective = Objective(LossCategories(LABELS), precision=Float32())
    result = objective.forward_backward(
        parallelize(model, parallel=ParallelConfig(), world=SingleProcess()), batches=batches
    )
    return result, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("moe", [NoMoE(), MoE(experts=4, select=TopK(k=2), balance=())])
def test_accumulation_equals_one_batch(moe: SparseLayer) -> None:
    batches = [random_batch(rows, seed=rows) for rows in (1, 7, 4)]  # of different sizes
    parts, part_grads = _gradients(batches, moe)
    whole, whole_grads = _gradients([_joined(batches)], moe)
    torch.testing.assert_close(parts.sums.losses, whole.sums.losses, rtol=1e-6, atol=0)
    assert float(parts.sums.terms["objective"]) == pytest.approx(
        float(whole.sums.terms["objective"]), rel=1e-6
    )
    assert parts.sums.tokens == whole.sums.tokens
    for name, grad in whole_grads.items():
        torch.testing.assert_close(part_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "contrastive"])
def test_accumulation_equals_one_batch_of_every_head(name: str) -> None:
    batch = head_batch(name, rows=12)  # the pairs of a contrastive loss are those of a micro-batch
    found = []
    for batches in ([batch.select(slice(0, 2)), batch.select(slice(2, 12))], [batch]):
        torch.manual_seed(0)
        model = Transformer(HEADS[name])
        parallel_model = parallelize(model, parallel=ParallelConfig(), world=SingleProcess())
        objective = Objective(LossCategories(HEAD_LABELS), precision=Float32())
        result = objective.forward_backward(parallel_model, batches=batches)
        found.append((result.sums.losses, [p.grad for p in model.parameters()]))
    (part_losses, part_grads), (losses, grads) = found
    torch.testing.assert_close(part_losses, losses, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(part_grads, grads, rtol=1e-4, atol=1e-6)


def test_a_layers_own_terms_are_the_mean_over_micro_batches() -> None:
    moe = MoE(experts=4, select=TopK(k=2))
    batches = [random_batch(rows, seed=rows) for rows in (1, 7)]
    singles = [_gradients([batch], moe)[0].sums.terms["loss_balance"] for batch in batches]
    both = _gradients(batches, moe)[0].sums.terms["loss_balance"]
    assert float(both) == pytest.approx(float(sum(singles)) / 2, rel=1e-6)
