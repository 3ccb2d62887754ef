"""Communication volume of dispatch: counted on eight local ranks, and in closed form.

Each part dispatches and combines the rows of one MoE layer in forward and backward over gloo, on
nodes of four consecutive ranks, and counts what a rank sends with a ``CommunicationCounter``.
Routing is even (every set of experts once), so the closed forms are exact and a run on another
machine counts the same. Written to ``results/dispatch_communication.json`` and into the guide.

    python benchmarks/dispatch_communication.py
"""

import argparse
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from dispatch_communication_page import write_page
from dispatch_volume import (
    DispatchedTokens,
    all_to_all_bytes,
    all_to_all_inter_node_bytes,
    data_expert_model_bytes,
    hierarchical_inter_node_bytes,
)
from support import write_result
from torch import nn

from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.process_groups import Group, Subgroups, group_size, split_group
from moesaic.moe.adaptive_dispatcher import (
    AdaptiveDispatcher,
    DispatchCosts,
    GatherDegrees,
    LinearCost,
    StepLoad,
    possible_gather_degrees,
)
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, hierarchical_dispatcher
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU

RANKS, NODE, E, D, F = 8, 4, 8, 128, 64
BY_BYTES = DispatchCosts(
    all_to_all=LinearCost(0, 1), gather_weights=LinearCost(0, 1), compute=LinearCost(0, 0)
)
FLOAT = torch.float32


@dataclass(frozen=True)
class Groups:
    """Process groups of eight ranks, created by every rank in the same order."""

    world: Group
    pairs: Subgroups
    nodes: Subgroups

    @staticmethod
    def create() -> "Groups":
        world = distributed.group.WORLD
        return Groups(world, split_group(world, inner_size=2), split_group(world, inner_size=NODE))


def every_set(per_token: int) -> Routing:
    """One token for each set of experts."""
    sets = torch.tensor(list(combinations(range(E), per_token)))
    return Routing.from_topk(torch.ones(sets.shape), expert=sets, num_experts=E)


def grouped_experts(experts: int, *, hidden: int = F, dim: int = D) -> GroupedExperts:
    feed = FeedForwardConfig(hidden=hidden, activation=ReLU())
    made = GroupedExperts(ExpertShape(experts, dim, feed, bias=False))
    for matrix in made.parameters():
        nn.init.normal_(matrix)
    return made


def dispatch_and_combine(
    dispatcher: Dispatcher, *, experts: GroupedExperts, routing: Routing
) -> None:
    x = torch.randn(routing.num_tokens, D, requires_grad=True)
    weighted = replace(routing, weight=routing.weight.clone().requires_grad_())
    dispatcher.run_experts(x, routing=weighted, experts=experts).sum().backward()


def mesh_row(name: str, *, over: Group, slices: Group, data: Group) -> dict[str, Any]:
    """Count rows and gradients of one (data, expert, model) mesh."""
    places, cuts, copies = group_size(over), group_size(slices), group_size(data)
    routing, experts = every_set(2), grouped_experts(E // places, hidden=F // cuts)
    names: dict[str, Group] = {"expert": over, "model": slices, "data": data}
    with CommunicationCounter(axes=names) as counter:
        dispatch_and_combine(
            AllToAllDispatcher(over, slice_group=slices), experts=experts, routing=routing
        )
        for matrix in experts.parameters() if data is not None else ():
            distributed.all_reduce(matrix.grad, group=data)
    rows = DispatchedTokens(tokens=routing.num_tokens, experts_per_token=2, dim=D, itemsize=4)
    form = data_expert_model_bytes(
        rows, data=copies, expert=places, model=cuts, expert_bytes=2.0 * E * D * F * 4
    )
    return {
        "mesh": name,
        "counted": {axis: counter.total_bytes(axis=axis, dtype=FLOAT) for axis in names},
        "closed": {"expert": 2 * form.expert, "model": 2 * form.model, "data": form.data},
        "inter_node_rows": counter.inter_node_bytes(ranks_per_node=NODE, dtype=FLOAT)
        - sum(
            line.bytes
            for line in counter.entries()
            if line.axis == "data" and line.destination // NODE != distributed.get_rank() // NODE
        ),
    }


def meshes() -> list[dict[str, Any]]:
    groups = Groups.create()
    inner = split_group(groups.nodes.inner, inner_size=2)
    return [
        mesh_row("expert 8", over=groups.world, slices=None, data=None),
        mesh_row(
            "data 2 x expert 4", over=groups.nodes.inner, slices=None, data=groups.nodes.outer
        ),
        mesh_row(
            "data 2 x expert 2 x model 2",
            over=inner.outer,
            slices=inner.inner,
            data=groups.nodes.outer,
        ),
    ]


def folding() -> list[dict[str, Any]]:
    """Expert parallelism of degree 4 with attention of tensor degree 2: over data, or folded."""
    groups, found = Groups.create(), []
    rows = DispatchedTokens(tokens=comb(E, 2), experts_per_token=2, dim=D, itemsize=4)
    for name, over, near in (
        ("unfolded: every second rank", groups.pairs.outer, 2),
        ("folded: four consecutive", groups.nodes.inner, 4),
    ):
        with CommunicationCounter() as counter:
            dispatcher = AllToAllDispatcher(over)
            dispatch_and_combine(dispatcher, experts=grouped_experts(E // 4), routing=every_set(2))
        found.append(
            {
                "expert_group": name,
                "counted_inter_node": counter.inter_node_bytes(ranks_per_node=NODE, dtype=FLOAT),
                "closed_inter_node": 2
                * all_to_all_inter_node_bytes(rows, ranks=4, ranks_per_node=near),
                "counted": counter.total_bytes(dtype=FLOAT),
                "closed": 2 * all_to_all_bytes(rows, ranks=4),
            }
        )
    return found


def projection() -> dict[str, Any]:
    """A layer that dispatches whole rows, and one that dispatches a quarter of their width."""
    counted = {}
    for name, config in {
        "full": MoE(experts=E, select=TopK(k=2)),
        "projected": MoE(
            experts=E, select=TopK(k=2), dispatch_projection=DownProjection(ratio=0.25)
        ),
    }.items():
        torch.manual_seed(0)
        feed = FeedForwardConfig(hidden=F, activation=ReLU())
        layer = MoELayer(
            config, dim=D, feed_forward=feed, bias=False, layer_index=LayerIndex("moe")
        )
        torch.manual_seed(1)
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter)
        layer.experts = grouped_experts(E // RANKS, dim=config.dispatch_projection.expert_dim(D))
        layer.dispatcher = AllToAllDispatcher(distributed.group.WORLD)
        torch.manual_seed(2 + distributed.get_rank())
        x = torch.randn(64, D, requires_grad=True)
        with CommunicationCounter() as counter:
            answer = layer(x, context=TokenContext.unbatched(64), router_state=RouterState())
            answer.out.sum().backward()
        counted[name] = counter.total_bytes(kind="all-to-all", dtype=FLOAT)
    return {**counted, "ratio": counted["projected"] / counted["full"], "closed": 0.25}


def hierarchical() -> list[dict[str, Any]]:
    """Bytes between nodes of a flat and of a hierarchical all-to-all."""
    groups, found = Groups.create(), []
    for per_token in (1, 2, 4):
        routing = every_set(per_token)
        rows = DispatchedTokens(
            tokens=routing.num_tokens, experts_per_token=per_token, dim=D, itemsize=4
        )
        crossing = {}
        for name, dispatcher in (
            ("flat", AllToAllDispatcher(groups.world)),
            (
                "hierarchical",
                hierarchical_dispatcher(
                    inter_node=groups.nodes.outer, intra_node=groups.nodes.inner
                ),
            ),
        ):
            with CommunicationCounter() as counter:
                dispatch_and_combine(
                    dispatcher, experts=grouped_experts(E // RANKS), routing=routing
                )
            crossing[name] = counter.inter_node_bytes(ranks_per_node=NODE)
        flat = 2 * all_to_all_inter_node_bytes(rows, ranks=RANKS, ranks_per_node=NODE)
        once = 2 * hierarchical_inter_node_bytes(rows, experts=E, nodes=RANKS // NODE)
        # an edge between nodes has its expert and weight, and in backward the weight's gradient
        edges = rows.tokens * per_token // 2 * (8 + 4 + 4)
        found.append(
            {
                "per_token": per_token,
                **{f"counted_{name}": size for name, size in crossing.items()},
                "closed_flat": flat + NODE * 8,
                "closed_hierarchical": once + edges + 2 * 8,
            }
        )
    return found


def adaptive() -> list[dict[str, Any]]:
    """Two experts, each sliced over four ranks: rows repeated, or weights gathered."""
    groups, found = Groups.create(), []
    over, slices, hidden = groups.nodes.outer, groups.nodes.inner, 96
    candidates = possible_gather_degrees(2, slices=NODE)
    for factor in range(1, 9):
        tokens = 8 * factor
        expert = (torch.arange(tokens) % 2)[:, None]
        routing = Routing.from_topk(torch.ones(tokens, 1), expert=expert, num_experts=2)
        experts = grouped_experts(1, hidden=hidden // NODE)
        step = StepLoad(
            torch.full((2, NODE, 2), tokens // 2),
            row_bytes=4 * D,
            weight_bytes=4 * sum(matrix.numel() for matrix in experts.parameters()),
        )
        row: dict[str, Any] = {"capacity_factor": factor, "counted": {}, "closed": {}}
        for degrees in candidates:
            dispatcher = AdaptiveDispatcher(
                over, slice_group=slices, costs=BY_BYTES, candidates=[degrees]
            )
            with CommunicationCounter() as counter:
                dispatch_and_combine(dispatcher, experts=experts, routing=routing)
            sent = step.traffic(degrees)
            row["counted"][label(degrees)] = counter.total_bytes(dtype=FLOAT)
            row["closed"][label(degrees)] = 2 * (2 * sent.rows + 2 * sent.copies + sent.weights)
        free = AdaptiveDispatcher(over, slice_group=slices, costs=BY_BYTES)
        x = torch.randn(tokens, D)
        row["selected"] = label(free.choose(x, routing=routing, experts=experts))
        found.append(row)
    return found


def label(degrees: GatherDegrees) -> str:
    """Tutel's r: how often a row is repeated; 0 where only weights are sent."""
    return "r=0" if degrees.experts > 1 else f"r={NODE // degrees.slices}"


def same_on_all_ranks(part: Any) -> Any:
    """Run a part on all ranks, whose counts must be equal."""
    every = run_on_ranks(RANKS, part, timeout_s=300)
    if any(found != every[0] for found in every):
        raise ValueError(f"ranks counted differently in {part.__name__}: {every}")
    return every[0]


def summed(part: Any) -> dict[str, Any]:
    """Run a part with uneven routing: the sums over ranks."""
    every = run_on_ranks(RANKS, part, timeout_s=300)
    full, projected = (sum(found[name] for found in every) for name in ("full", "projected"))
    sums = {"full": full, "projected": projected, "ratio": projected / full}
    return sums | {"closed": every[0]["closed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    results = Path("benchmarks/results/dispatch_communication.json")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--page", type=Path, default=Path("docs/guide/communication-volume.md"))
    options = parser.parse_args()
    result = {
        "ranks": RANKS,
        "ranks_per_node": NODE,
        "row_bytes": 4 * D,
        "meshes": same_on_all_ranks(meshes),
        "folding": same_on_all_ranks(folding),
        "projection": summed(projection),
        "hierarchical": same_on_all_ranks(hierarchical),
        "adaptive": same_on_all_ranks(adaptive),
    }
    write_result(options.out, result)
    write_page(options.page, result)


if __name__ == "__main__":
    main()
