"""A routing rule of your own: define a Select, use its name in the config, train."""

import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic.moe.expert_selection import Select
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing


class HashByPosition(Select):
    """Token t is routed to expert t mod E with weight one: nothing learned, exactly balanced."""

    stride: int = 1

    def __call__(self, router: RouterContext) -> Routing:
        tokens, experts = router.logits.shape
        expert = (torch.arange(tokens) * self.stride % experts)[:, None]
        weight = torch.ones(tokens, 1)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return min(1, num_experts)


# Defining the class registers it: its name is valid in Python, YAML and on the command line.
run = moesaic.recipe(
    "tiny",
    changes=["model.moe.select=HashByPosition(stride=1)", "model.moe.balance=[]", "steps=40"],
)
result = moesaic.fit(run, Path(tempfile.mkdtemp()) / "hashed")
print(
    f"loss {result.metrics['train/loss']:.2f}, worst overload {result.metrics['moe/max_vio']:.2f}"
)
