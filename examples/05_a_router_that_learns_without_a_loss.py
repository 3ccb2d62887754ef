"""A router with a state of its own: a handicap that learns from counts, without a loss."""

import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic.moe.router_context import RouterContext, RoutingStats, RuleState
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


class Thermostat(Select):
    """The likeliest expert, after a handicap of those that had more than their share so far."""

    rate: float = 0.5

    def start(self, num_experts: int) -> dict[str, torch.Tensor]:
        return {"handicap": torch.zeros(num_experts)}

    def learn(
        self, state: RuleState, *, seen: RoutingStats
    ) -> RuleState:  # after each step, on every rank alike
        share = seen.load / seen.load.sum() * len(seen.load) - 1
        return {"handicap": state["handicap"] + self.rate * share.float()}

    def __call__(self, gate: RouterContext) -> Routing:
        wanted = gate.logits.detach() - gate.state["handicap"]
        expert = wanted.argmax(-1, keepdim=True)
        weight = gate.logits.sigmoid().gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=gate.logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return min(1, num_experts)


# The handicap is a buffer of the router: saved with the weights, resumed, the same on every rank.
for select in ("Thermostat", "SwitchTop1"):
    changes = [f"model.moe.select={select}", "model.moe.balance=[]", "steps=40"]
    run = moesaic.recipe("tiny", changes=changes)
    result = moesaic.fit(run, Path(tempfile.mkdtemp()) / select.lower())
    loss, overload = result.metrics["train/loss"], result.metrics["moe/max_vio"]
    print(f"{select}: loss {loss:.2f}, worst overload {overload:.2f}")
