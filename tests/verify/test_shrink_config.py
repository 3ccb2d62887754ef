"""A shrunk run has small sizes and the same structure."""

import pytest

from moesaic.model.config import Stack
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SigmoidTopK, TopGroups
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReGLU, SwiGLU
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.rotary_scaling import LongRoPE
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.recipes.lookup import RECIPES, find_recipe
from moesaic.train.run import Run
from moesaic.verify.shrink_config import DIM, EPS, EXPERTS, HIDDEN, shrink_config


def sparse_pattern(run: Run) -> list[list[bool]]:
    stacks = (run.model.encoder, run.model.decoder)
    return [[stack.is_moe_layer(layer) for layer in range(stack.layers)] for stack in stacks]


@pytest.mark.parametrize("name", RECIPES.descriptions())
def test_every_recipe_shrinks_and_keeps_its_rules(name: str) -> None:
    before = find_recipe(name)
    after = shrink_config(before).run
    assert after.model.dim <= DIM
    assert after.model.feed_forward.hidden <= HIDDEN
    for ours, theirs in zip(sparse_pattern(after), sparse_pattern(before), strict=True):
        assert ours == theirs[: len(ours)]
        assert any(ours) == any(theirs)
    assert type(after.model.moe) is type(before.model.moe)  # dense controls have no experts
    kept = {"select", "limit", "balance", "shared_experts", "noise", "router_input", "cross_layer"}
    for rule in kept if isinstance(before.model.moe, MoE) else ():
        assert getattr(after.model.moe, rule) == getattr(before.model.moe, rule)
    assert after.model.dropout == before.model.dropout
    assert type(after.optimizer) is type(before.optimizer)


def test_heads_and_kv_heads_stay_and_their_width_shrinks() -> None:
    model = find_recipe("tiny").model.replace(
        dim=512, attention=AttentionConfig(heads=16, kv_heads=4)
    )
    after = shrink_config(find_recipe("tiny").replace(model=model)).run.model.attention
    assert (after.heads, after.kv_heads, after.head_dim) == (16, 4, 4)


LONG = LongRoPE(factor=2, original_length=64, short_factors=8 * (1.0,), long_factors=8 * (2.0,))


@pytest.mark.parametrize(
    "position", [Rotary(scaling=LONG), Rotary(fraction=0.25)], ids=["long", "part"]
)
def test_heads_keep_the_width_that_their_positions_need(position: Rotary) -> None:
    before = find_recipe("tiny").model.replace(
        dim=64, attention=AttentionConfig(heads=4), position=position
    )
    after = shrink_config(find_recipe("tiny").replace(model=before)).run.model
    assert (after.attention.head_dim, after.position) == (16, position)


def test_a_gate_of_relu_becomes_a_smooth_one() -> None:
    kinked = FeedForwardConfig(hidden=24, activation=ReGLU())
    model = find_recipe("tiny").model.replace(feed_forward=kinked)
    after = shrink_config(find_recipe("tiny").replace(model=model)).run.model.feed_forward
    assert after == kinked.replace(activation=SwiGLU())


def test_a_rule_keeps_the_experts_that_it_needs() -> None:
    rule = SigmoidTopK(k=4, expert_groups=TopGroups(num_groups=16, top_groups=4))
    moe = MoE(experts=256, select=rule, limit=Capacity(), shared_experts=SharedExperts(), hidden=32)
    model = find_recipe("tiny").model.replace(moe=moe)
    after = shrink_config(find_recipe("tiny").replace(model=model)).run.model.moe
    assert isinstance(after, MoE)
    assert after.experts in EXPERTS
    assert after.experts % 16 == 0
    assert (after.select, after.limit, after.shared_experts) == (rule, Capacity(), SharedExperts())
    assert after.hidden == 8  # a quarter of the dense width, as before


def test_listed_sparse_layers_are_those_of_the_blocks_that_stay() -> None:
    stack = Stack(layers=9, sparse_layers=(0, 3, 8), experts_per_layer=(4, 4, 4))
    model = find_recipe("tiny-lm").model.replace(decoder=stack)
    after = shrink_config(find_recipe("tiny-lm").replace(model=model)).run.model.decoder
    assert (after.layers, after.sparse_layers, len(after.experts_per_layer)) == (4, (0, 3), 2)


def test_experts_per_layer_keep_one_number_for_each_moe_block() -> None:
    stack = Stack(layers=6, moe_every=2, experts_per_layer=(4, 32, 64))
    model = find_recipe("tiny").model.replace(encoder=stack, moe=MoE(experts=4))
    after = shrink_config(find_recipe("tiny").replace(model=model)).run.model.encoder
    assert (after.layers, after.experts_per_layer) == (4, (4, 8))


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.5), Muon(adamw=AdamW(lr=0.5))])
def test_tiny_gradients_do_not_change_weights_by_their_sign(optimizer: AdamW | Muon) -> None:
    after = shrink_config(find_recipe("tiny").replace(optimizer=optimizer)).run.optimizer
    inner = after.adamw if isinstance(after, Muon) else after
    assert isinstance(inner, AdamW)
    assert (inner.eps, inner.lr) == (EPS, 0.5)


def test_changed_keys_are_listed() -> None:
    changed = shrink_config(find_recipe("tiny")).changes
    assert "model.dim: 64 -> 32" in changed
    assert not any("select" in line for line in changed)
