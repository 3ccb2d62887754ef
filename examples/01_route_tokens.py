"""Routing is a list of edges: make one, look at it, limit it."""

import torch

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.limit import Capacity, WeightPriority
from moesaic.moe.router_context import RouterContext
from moesaic.moe.select import TopK

torch.manual_seed(0)
gate = RouterContext.from_logits(
    torch.randn(5, 4), training=True
)  # logits of five tokens, four experts

routing = TopK(k=2)(gate)
print("token -> expert  weight")
for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True):
    print(f"{int(token):5} -> {int(expert):6}  {float(weight):.2f}")
print("load per expert:", routing.load().tolist())

# An expert takes at most ceil(factor * edges / experts) edges: here 2. The lightest one over that
# is dropped: it keeps its place in the list and points at expert 4, which there is none of.
limited = Capacity(factor=0.8, minimum=1, priority=WeightPriority())(
    routing, router=gate, batch_group=SingleRankBatch()
)
print("dropped edges:", limited.dropped.nonzero().flatten().tolist())
print("load per expert:", limited.load().tolist())
