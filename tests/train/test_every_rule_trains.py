"""Every balance loss, cross-layer router and router input trains a model: finite, falling loss."""

import math

import pytest

from model.samples import CONDITIONED, LINKED
from moe.variants import BALANCES, balanced
from moesaic.model.config import Stack
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import AdamW
from moesaic.testing.tiny_models import (
    TinyStream,
    random_batch,
    tiny_model_config,
    tiny_run,
    tiny_trainer,
)

STEPS = 5
RULES = (
    {f"balance-{name}": balanced(name) for name in BALANCES}
    | {name: MoE(experts=4, select=TopK(k=2), cross_layer=link) for name, link in LINKED.items()}
    | {name: MoE(experts=4, select=TopK(k=2), router_input=c) for name, c in CONDITIONED.items()}
)


class OneBatch(TinyStream):
    """The same rows again and again."""

    def __next__(self):
        return random_batch(8, seed=1)


@pytest.mark.parametrize("side", ["encoder-decoder", "decoder-only"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains(name, side):
    config = tiny_model_config(moe=RULES[name], layers=2)
    if side == "decoder-only":
        config = config.replace(encoder=Stack(layers=0))
    trainer = tiny_trainer(tiny_run(model=config, steps=STEPS, optimizer=AdamW(lr=0.02)))
    trainer.data = OneBatch()
    losses = []
    for _ in range(STEPS):
        terms = trainer.train_step().result.sums.terms
        assert all(math.isfinite(float(value)) for value in terms.values())
        losses.append(float(terms["cross_entropy"]))
    assert losses[-1] < losses[0] - 0.3, losses
    for parameter in trainer.model.parameters():
        assert parameter.isfinite().all()
