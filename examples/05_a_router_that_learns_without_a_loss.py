"""A stateful routing rule: a per-expert handicap, updated from load counts without a loss."""

import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic.moe.expert_selection import Select
from moesaic.moe.router_context import RouterContext, RoutingStats, RuleState
from moesaic.moe.routing import Routing


class Thermostat(Select):
    """Top-1 routing with a handicap for experts whose load was above the mean."""

    rate: float = 0.5

    def initial_state(self, num_experts: int, /) -> dict[str, torch.Tensor]:
        return {"handicap": torch.zeros(num_experts)}

    def update_state(self, state: RuleState, stats: RoutingStats, /) -> RuleState:
        # after each optimizer step, the same on every rank
        share = stats.load / stats.load.sum() * len(stats.load) - 1
        return {"handicap": state["handicap"] + self.rate * share.float()}

    def __call__(self, router: RouterContext) -> Routing:
        scores = router.logits.detach() - router.state["handicap"]
        expert = scores.argmax(-1, keepdim=True)
        weight = router.logits.sigmoid().gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=router.logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return min(1, num_experts)


# The handicap is a buffer of the router: saved in checkpoints, and the same on every rank.
for select in ("Thermostat", "SwitchTop1"):
    changes = [f"model.moe.select={select}", "model.moe.balance=[]", "steps=40"]
    run = moesaic.recipe("tiny", changes=changes)
    result = moesaic.fit(run, Path(tempfile.mkdtemp()) / select.lower())
    loss, overload = result.metrics["train/loss"], result.metrics["moe/max_vio"]
    print(f"{select}: loss {loss:.2f}, worst overload {overload:.2f}")
