"""Stochastic warm-up starts from random logits and ends at exactly the router's."""

import torch

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterContext, RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.router_noise import NoRouterNoise, StochasticWarmup

D, E, T, STEPS = 6, 8, 400, 5


def _router(noise):
    torch.manual_seed(3)
    config = MoE(experts=E, select=SwitchTop1(), noise=noise)
    made = Router(config, dim=D, layer_index=LayerIndex("test.0"))
    torch.nn.init.normal_(made.gate.weight)
    return made


def _step(router):
    x = torch.ones(T, D) + 0.1 * torch.randn(T, D)  # alike, so one expert takes nearly all
    routed = router(
        x,
        context=TokenContext.unbatched(T),
        router_state=RouterState(),
        batch_group=SingleRankBatch(),
    )
    router.accumulate_stats(routed.stats_vector)
    router.update_rules()
    return routed, router.gate(x, router_state=RouterState()).logits


def _overload(routed):
    load = routed.routing.load().double()
    return float(load.max() / load.mean())


def test_loads_of_the_first_steps_are_more_balanced():
    with_, without = _router(StochasticWarmup(warmup_steps=50)), _router(NoRouterNoise())
    for _ in range(3):
        assert _overload(_step(without)[0]) > 4
    first = _overload(_step(with_)[0])
    assert first < 2


def test_logits_are_interpolated_and_then_exact():
    router = _router(StochasticWarmup(warmup_steps=STEPS))
    for step in range(STEPS + 2):
        before = {name: value.clone() for name, value in router.rule_state("noise").items()}
        routed, plain = _step(router)
        alpha = min(step / STEPS, 1)
        draw = TokenContext.unbatched(T).normal("routing warm-up", width=E)
        random = before["mean"] + before["std"] * draw
        torch.testing.assert_close(routed.logits, alpha * plain + (1 - alpha) * random)
        if step >= STEPS:
            assert torch.equal(routed.logits, plain)


def test_the_state_tracks_mean_and_deviation_of_each_experts_logits():
    router = _router(StochasticWarmup(warmup_steps=50, rate=0.5))
    _, first = _step(router)
    state = router.rule_state("noise")
    torch.testing.assert_close(state["mean"], first.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["std"], first.std(0, correction=0), rtol=1e-3, atol=1e-5)
    mean = state["mean"].clone()
    _, second = _step(router)
    torch.testing.assert_close(state["mean"], (mean + second.mean(0)) / 2, rtol=1e-4, atol=1e-5)
    assert state["step"] == 2


def test_the_first_step_draws_logits():
    noise, logits = StochasticWarmup(), torch.randn(9, E)
    gate = RouterContext.from_logits(logits, training=True).with_state(noise.initial_state(E))
    assert not torch.equal(noise.apply_to_logits(gate), logits)


def test_in_evaluation_no_logits_are_drawn():
    noisy, plain = _router(StochasticWarmup(warmup_steps=STEPS)), _router(NoRouterNoise())
    x = torch.randn(T, D)
    logits = [
        router.eval()(
            x,
            context=TokenContext.unbatched(T),
            router_state=RouterState(),
            batch_group=SingleRankBatch(),
        ).logits
        for router in (noisy, plain)
    ]
    assert torch.equal(*logits)
