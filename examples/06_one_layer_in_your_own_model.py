"""One MoE layer as a plain module: a model and a loop of your own, autocast, ``torch.compile``."""

import torch
import torch.nn.functional as F
from torch import nn

import moesaic
from moesaic.moe.expert_bias import BiasUpdate

MODULUS, STEPS = 23, 60


class Block(nn.Module):
    """Normalise, mix of experts, add."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # balanced without a loss of weight: a bias for each expert, updated after each step
        self.experts = moesaic.MoE(dim, 64, experts=4, router="top2", balance=(BiasUpdate(),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(self.norm(x))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(MODULUS, 32), Block(32), nn.Linear(32, MODULUS))
compiled = torch.compile(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(STEPS):
    x = torch.randint(MODULUS, (64, 8))  # [rows, positions]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = compiled(x)
    loss = F.cross_entropy(logits.float().flatten(0, 1), (5 * x.flatten() + 3) % MODULUS)
    optimizer.zero_grad()
    (loss + moesaic.aux_loss(model)).backward()
    optimizer.step()
    moesaic.update_rules(model)  # statistics of all tokens since the last step
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
print("5 * 6 + 3 mod 23 is", model(torch.tensor([[6]])).argmax().item())
