"""Law: every selection rule trains in a whole model, encoder-decoder or decoder-only."""

import pytest
import torch

from model.samples import NONE, SPARSELY
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection_dynamic import ExpertChoice
from moesaic.moe.soft_moe import SoftMoE
from moesaic.testing.tiny_models import (
    TinyStream,
    random_batch,
    tiny_model_config,
    tiny_run,
    tiny_trainer,
)

RULES = SPARSELY | {
    "expert-choice": MoE(experts=3, select=ExpertChoice(), balance=()),
    "soft": SoftMoE(experts=3),
}


class Same(TinyStream):
    """One batch again and again."""

    def __next__(self):
        self.drawn += 1
        return random_batch(8, seed=1)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_overfits_a_batch(name):
    run = tiny_run(model=tiny_model_config(moe=RULES[name]), steps=30)
    trainer = tiny_trainer(run)
    trainer.data = Same()
    losses = []
    for _ in range(30):
        trainer.train_step()
        losses.append(trainer.metrics.compute_and_reset(trainer.world))
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in losses)
    assert losses[-1]["train/loss"] < 0.9 * losses[0]["train/loss"]


@pytest.mark.parametrize("name", SPARSELY)
def test_a_rule_trains_and_generates_without_an_encoder(name):
    config = tiny_model_config(moe=SPARSELY[name]).replace(encoder=NONE)
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = random_batch(8, seed=2)
    losses = []
    for _ in range(5):
        output = model(batch)
        own = [term for record in output.records for term in record.losses.values()]
        loss = model.loss(output).total / batch.num_predicted
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + sum(own)).backward()
        optimizer.step()
    assert losses[-1] < losses[0]
