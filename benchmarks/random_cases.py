"""Random cases: a random small model, random batches, and a random parallel plan that fits both.

Every part of a model is drawn from its family, so a new member of a family is tried under every
plan without a change here.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.head import LanguageModelHead
from moesaic.moe.auxiliary_losses import Balance, MicroBatchBalance
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DispatchProjection
from moesaic.moe.expert_capacity import Capacity, Dropless, Limit, Priority
from moesaic.moe.expert_selection import Select, TopK
from moesaic.moe.experts import Expert, FeedForwardExpert, LoRAExpert
from moesaic.moe.null_experts import NullExperts
from moesaic.moe.router_gate import CrossLayerRouting, RouterInput
from moesaic.moe.router_noise import RouterNoise
from moesaic.moe.shared_experts import SharedExpertBranch
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import Activation, FeedForwardConfig
from moesaic.nn.norm import Norm
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.sequence_mixer import SequenceMixer
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.run import Run
from moesaic.verify.enumerate_plans import (
    meta_model,
    option_families,
    parallel_plans,
    plan_problems,
)
from moesaic.verify.shrink_config import shrink_config
from moesaic.verify.synthetic_batches import VOCABULARY, SyntheticShape

EXCLUDED = (MicroBatchBalance,)  # balances the batch of each rank: another loss by definition
MIXERS = ("one", "two")
PATTERNS = ("attention", "attention", "one", "one, two", "one > two", "two | one", "one-, two")


@dataclass(frozen=True, slots=True)
class RandomCase:
    """A run, its batches and a plan of ``ranks``."""

    run: Run
    shape: SyntheticShape
    parallel: ParallelConfig
    world_size: int

    @property
    def summary(self) -> dict[str, Any]:
        """The case as JSON data."""
        model = self.run.model.to_dict()
        return {
            "ranks": self.world_size,
            "plan": self.parallel.to_dict(),
            "rows": self.shape.rows,
            "length": self.shape.length,
            "model": model,
            "optimizer": type(self.run.optimizer).__name__,
        }


def random_cases(seed: int, *, max_ranks: int = 4) -> Iterator[RandomCase]:
    """Yield endless cases of 2 to ``max_ranks`` ranks; the n-th depends on ``seed`` and n only."""
    number = 0
    while True:
        draw = random.Random(f"{seed}/{number}")
        number += 1
        case = _random_case(draw, max_ranks=max_ranks)
        if case is not None:
            yield case


def _random_case(draw: random.Random, *, max_ranks: int) -> RandomCase | None:
    """Return None where the drawn parts do not fit together."""
    try:
        model = _random_model(draw)
        optimizer = draw.choice((AdamW(lr=0.01), Muon(lr=0.01, adamw=AdamW(lr=0.01))))
        if isinstance(model.moe, MoE) and isinstance(model.moe.expert, LoRAExpert):
            # half of its matrices start at zero: there Muon amplifies rounding errors, which the
            # gradients of the other half depend on
            optimizer = AdamW(lr=0.01)
        smoothing = draw.choice((0.0, 0.1))
        run = shrink_config(
            tiny_run(
                model=model.replace(head=LanguageModelHead(label_smoothing=smoothing)),
                optimizer=optimizer,
            )
        ).run
        run = run.replace(gradient_accumulation_steps=draw.randint(1, 4))
        ranks = draw.randint(2, max_ranks)
        parallel = _sample_plan(ranks, run=run, draw=draw)
    except ConfigError:
        return None
    if parallel is None:
        return None
    source = run.model.encoder.layers > 0
    shape = SyntheticShape(rows=draw.randint(1, 9), length=draw.randint(2, 12), source=source)
    return RandomCase(run.replace(seed=draw.randrange(10**6)), shape, parallel, ranks)


def _sample_plan(world_size: int, *, run: Run, draw: random.Random) -> ParallelConfig | None:
    """Return a random valid plan; None if there is none."""
    model = meta_model(run)
    plans = list(parallel_plans(world_size))
    draw.shuffle(plans)
    for plan in plans:
        options = {field: draw.choice(members) for field, members in option_families(plan)}
        parallel = run.parallel.replace(plan=plan, **options)
        if not plan_problems(parallel, model=model, run=run):
            return parallel
    return None


def _random_model(draw: random.Random) -> ModelConfig:
    heads = draw.choice((1, 2, 3, 4, 6, 8))
    groups = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    hidden = draw.choice((8, 12, 24))
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=draw.choice((8, 12, 16)),
        mixers={name: _random_member(draw, SequenceMixer) for name in MIXERS},
        encoder=_random_stack(draw, layers=draw.randint(0, 2)),
        decoder=_random_stack(draw, layers=draw.randint(1, 2)),
        attention=AttentionConfig(heads=heads, kv_heads=groups, head_dim=4),
        feed_forward=FeedForwardConfig(hidden=hidden, activation=_random_member(draw, Activation)),
        moe=_random_moe(draw),
        norm=_random_member(draw, Norm),
        position=_random_member(draw, PositionalEncoding),
        embedding=EmbeddingConfig(tied=draw.random() < 0.7),
        bias=draw.random() < 0.4,
        dropout=draw.choice((0.0, 0.0, 0.1)),
    )


def _random_stack(draw: random.Random, *, layers: int) -> Stack:
    every = draw.choice((0, 1, 1, 2))
    return Stack(layers=layers, moe_every=every, pattern=draw.choice(PATTERNS))


def _random_moe(draw: random.Random) -> MoE:
    balances = [_random_member(draw, Balance) for _ in range(draw.randint(0, 2))]
    return MoE(
        experts=draw.choice((1, 2, 3, 4, 6, 8)),
        hidden=draw.choice((None, 4, 8, 16)),
        select=TopK(k=draw.randint(1, 3)) if draw.random() < 0.4 else _random_member(draw, Select),
        limit=_random_limit(draw),
        balance=tuple(term for term in balances if not isinstance(term, EXCLUDED)),
        noise=_random_member(draw, RouterNoise),
        expert=FeedForwardExpert() if draw.random() < 0.8 else _random_member(draw, Expert),
        shared_experts=_random_member(draw, SharedExpertBranch),
        null_experts=_random_member(draw, NullExperts),
        dispatch_projection=_random_member(draw, DispatchProjection),
        router_input=_random_member(draw, RouterInput),
        cross_layer=_random_member(draw, CrossLayerRouting),
    )


def _random_limit(draw: random.Random) -> Limit:
    if draw.random() < 0.5:
        return Dropless()
    factor = draw.choice((0.5, 1.0, 1.5))
    return Capacity(
        factor=factor, minimum=draw.randint(0, 2), priority=_random_member(draw, Priority)
    )


def _random_member(draw: random.Random, family: type[Choice]) -> Any:
    """Return a member with default values; every other time the first, which is the plain one."""
    members = [
        member
        for member in family.members.values()
        if member.__module__.startswith("moesaic.")  # the tests define others
        and not any(field.is_required() for field in member.model_fields.values())
    ]
    return (members[0] if draw.random() < 0.5 else draw.choice(members))()
