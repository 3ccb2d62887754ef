"""Repairs of transformers, for comparisons: where a forward pass there is not that of its model.

NLLB-MoE in transformers 5.24: the router's mask [tokens, experts] of zeros and ones is read as a
list of experts, so first choices go to expert 1 and all others to expert 0, and experts 2 to E - 1
are never used. Version 4.46 and fairseq, which trained the model, use every expert.

Letters: T tokens, D model dim, E experts.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn

from moesaic.core.shapes import Float, Shaped, Tensor


def repair_forward(model: nn.Module) -> list[str]:
    """Repair a model of transformers in place. Returns the names of what was repaired."""
    found = [m for m in model.modules() if type(m).__name__ == "NllbMoeExperts"]
    for module in found:
        module.forward = MethodType(_nllb_experts, module)
    return ["NllbMoeExperts.forward"] if found else []


def _nllb_experts(
    experts: Any,
    hidden_states: Float[Tensor, "T D"],
    router_mask: Shaped[Tensor, "T E"],
    router_probs: Float[Tensor, "T E"],
) -> Float[Tensor, "T D"]:
    del router_mask  # of first choices alone
    out, dropout = torch.zeros_like(hidden_states), experts.moe_token_dropout
    for index in range(experts.num_experts):
        token = router_probs[:, index].nonzero()[:, 0]
        found = experts[f"expert_{index}"](hidden_states[token]) * router_probs[token, index, None]
        if dropout > 0:
            found = experts.token_dropout(found) if experts.training else found * (1 - dropout)
        out = out.index_add(0, token, found)
    return out
