"""An MoE layer equals its definition: the sum over edges of weight times expert(token)."""

import torch

from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU

torch.manual_seed(0)
config = MoE(experts=4, select=TopK(k=2))
layer = MoELayer(
    config,
    dim=16,
    feed_forward=FeedForwardConfig(hidden=32, activation=SwiGLU()),
    bias=False,
    layer_index=LayerIndex("example"),
)
torch.nn.init.normal_(layer.experts.up, std=0.2)
torch.nn.init.normal_(layer.experts.down, std=0.2)
torch.nn.init.normal_(layer.router.gate.weight, std=0.5)
x = torch.randn(6, 16)

output = layer(x, context=TokenContext.unbatched(6), router_state=RouterState())
fast, record = output.out.detach(), output.record

slow = torch.zeros_like(x)
assert record is not None
edges = zip(record.routing.token, record.routing.expert, record.routing.weight, strict=True)
for token, expert, weight in edges:
    hidden = SwiGLU()(x[token] @ layer.experts.up[expert])
    slow[token] += (weight * (hidden @ layer.experts.down[expert])).detach()

print("largest difference:", float((fast - slow).abs().max()))
print(
    "losses, returned with the output:", {n: round(v.item(), 4) for n, v in record.losses.items()}
)
assert torch.allclose(fast, slow, atol=1e-6)
