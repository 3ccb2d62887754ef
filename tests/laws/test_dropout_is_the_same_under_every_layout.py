"""Law: what is dropped and drawn for a token depends on the token alone, not on who holds it.

Ranks that share rows are in ``test_context_parallel_ranks_share_one_loss.py``, with dropout.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.samples import VARIANTS, batch_for, padded
from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import Top2
from moesaic.moe.router_noise import Jitter
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.verify.synthetic_batches import shard_batch

DRAWS = MoE(experts=4, select=Top2(second="sampled"), noise=Jitter(epsilon=0.2), balance=())
MODEL = tiny_model_config(moe=DRAWS, layers=2).replace(dropout=0.3)
LAYOUTS: dict[str, Callable[[Batch], Sequence[Batch]]] = {
    "two parts": lambda batch: [shard_batch(batch, rank=part, world_size=2) for part in range(2)],
    "a row at a time": lambda batch: [
        shard_batch(batch, rank=row, world_size=6) for row in range(6)
    ],
    "another order": lambda batch: [batch.select(torch.tensor([4, 0, 5, 3, 1, 2]))],
    "more padding": lambda batch: [padded(batch, 3)],
}


def _gradients(batches: Sequence[Batch], *, recompute: bool = False, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    if recompute:
        model.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    torch.manual_seed(seed)  # the rank's stream, which nothing may depend on
    totals = [model.loss(model(batch)).total for batch in batches]
    torch.stack(totals).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [torch.stack(totals).sum().detach(), *grads]


def _close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_the_same_under_every_layout(layout: str) -> None:
    batch = random_batch(6, seed=1)
    _close(_gradients(LAYOUTS[layout](batch), seed=1), _gradients([batch]))


def test_a_pass_that_is_repeated_drops_the_same() -> None:
    batch = random_batch(6, seed=1)
    _close(_gradients([batch], recompute=True, seed=1), _gradients([batch]))


def test_another_epoch_of_the_same_rows_drops_others() -> None:
    batch = random_batch(6, seed=1)
    other = replace(batch, key=batch.key + 1)
    assert not torch.allclose(_gradients([other])[0], _gradients([batch])[0], rtol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_draws_from_the_stream_of_a_rank(name: str) -> None:
    config = VARIANTS[name].replace(dropout=0.3)
    model, batch = Transformer(config), batch_for(config)
    before = torch.get_rng_state()
    output = model(batch)
    losses = [loss for record in output.records for loss in record.losses.values()]
    (model.loss(output).total + sum(losses)).backward()
    assert torch.equal(torch.get_rng_state(), before)
