"""Routing is a list of token-expert edges: make one, print it, and apply a capacity limit."""

import torch

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.expert_capacity import Capacity, WeightPriority
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_context import RouterContext

torch.manual_seed(0)
logits = torch.randn(5, 4)  # five tokens, four experts
router = RouterContext.from_logits(logits, training=True)

routing = TopK(k=2)(router)
print("token -> expert  weight")
for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True):
    print(f"{int(token):5} -> {int(expert):6}  {float(weight):.2f}")
print("load per expert:", routing.load().tolist())

# An expert takes at most ceil(factor * edges / experts) edges: here 2. Edges of smallest weight
# over that capacity are dropped: they stay in the list with expert 4, which does not exist.
capacity = Capacity(factor=0.8, minimum=1, priority=WeightPriority())
limited = capacity(routing, router, SingleRankBatch())
print("dropped edges:", limited.dropped.nonzero().flatten().tolist())
print("load per expert:", limited.load().tolist())
