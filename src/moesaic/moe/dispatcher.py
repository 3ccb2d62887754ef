"""Dispatcher: moves token rows to their experts and combines the experts' outputs.

``LocalDispatcher`` serves experts on this rank; those for experts on other ranks are in
``all_to_all_dispatcher.py``, ``chunked_dispatcher.py`` and ``adaptive_dispatcher.py``. A dispatcher
holds process groups and no tensors, so activation checkpointing and several micro-batches at a
time are safe.

Letters: T tokens, N edges, R rows, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing
from moesaic.ops.moe_kernel import Edges, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups, group_by_expert


@runtime_checkable
class ExpertCompute(Protocol):
    """The computation of the experts on this rank, as a dispatcher calls it."""

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        """Apply the experts to rows sorted by expert."""
        ...

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Permute tokens, apply the experts, unpermute and sum by weight; possibly fused."""
        ...

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, "ExpertCompute"], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``function(x, experts)``, which may call the experts several times.

        Module hooks run once around it, so ZeRO gathers the parameters once.
        """
        ...


@runtime_checkable
class Dispatcher(Protocol):
    """Dispatches token rows to the ranks of their experts and combines the outputs."""

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of expert outputs: dispatch, experts, combine."""
        ...


class LocalDispatcher:
    """The dispatcher for experts that are all on this rank: permute and unpermute only."""

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        return experts.forward_edges(x, edges=sort_edges(routing))


@dataclass(frozen=True, slots=True)
class WeightedInputs:
    """``dispatcher`` with the weights of edges on the inputs of experts: ``sum expert(w x)``.

    As in Llama 4, and ``apply_router_weight_on_input`` of vLLM. A row is sent for each edge.
    """

    dispatcher: Dispatcher

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        count, kept = routing.expert.numel(), (~routing.dropped).float()
        index = torch.arange(count, device=x.device)
        edges = replace(routing, token=index, weight=kept, num_tokens=count, per_token=1)
        if routing.per_token == 1:
            rows = (x * routing.weight[:, None]).to(x.dtype)
            return self.dispatcher.run_experts(rows, routing=edges, experts=experts)
        # all edges as one group, in their order
        zero, ones = torch.zeros_like(routing.expert), torch.ones_like(kept)
        group = sort_edges(replace(routing, expert=zero, weight=ones, num_experts=1))
        rows = (permute_tokens(x, edges=group) * routing.weight[:, None]).to(x.dtype)
        y = self.dispatcher.run_experts(rows, routing=edges, experts=experts)
        return unpermute_tokens(y, edges=group)


def sort_edges(routing: Routing) -> Edges:
    """Return the edges of a routing with their order by expert."""
    groups = group_by_expert(routing.expert, num_experts=routing.num_experts)
    return Edges(routing.token, routing.weight, groups, routing.num_tokens, routing.per_token)


def apply_experts(
    rows: Float[Tensor, "R D"], *, groups: RowGroups, experts: ExpertCompute
) -> Float[Tensor, "R D"]:
    """Return the experts' outputs in the order of ``rows``; ``groups`` sorts rows by expert."""
    count = rows.shape[0]
    ones = torch.ones(count, dtype=torch.float32, device=rows.device)
    index = torch.arange(count, device=rows.device)
    return experts.forward_edges(rows, edges=Edges(index, ones, groups, count, 1))
