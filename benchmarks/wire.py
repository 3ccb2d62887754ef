"""Bytes on the wire, counted in real runs on eight ranks of this machine beside the closed forms.

Each part moves the rows of one MoE layer forward and backward over gloo, a node being four ranks in
a row, and counts with ``Wire`` what a rank sends. Routing is even, by having every set of experts
once, so the closed forms are exact and a run on another machine counts the same. Written to
``results/wire.json`` and into the guide.

    python benchmarks/wire.py
"""

import argparse
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from dispatch_volume import (
    DispatchedTokens,
    all_to_all_bytes,
    all_to_all_inter_node_bytes,
    data_expert_model_bytes,
    hierarchical_inter_node_bytes,
)
from support import write_result
from torch import nn
from wire_page import write_page

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
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_logits import LayerIndex
from moesaic.moe.routing import Routing
from moesaic.moe.select import TopK
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU

RANKS, NODE, E, D, F = 8, 4, 8, 128, 64
BY_BYTES = DispatchCosts(
    all_to_all=LinearCost(0, 1), gather_weights=LinearCost(0, 1), compute=LinearCost(0, 0)
)
FLOAT = torch.float32


@dataclass(frozen=True)
class Folds:
    """Groups of eight ranks, all made by every rank in the same order."""

    world: Group
    pairs: Subgroups
    nodes: Subgroups

    @staticmethod
    def made() -> "Folds":
        world = distributed.group.WORLD
        return Folds(world, split_group(world, inner_size=2), split_group(world, inner_size=NODE))


def every_set(per_token: int) -> Routing:
    """One token for each set of experts."""
    sets = torch.tensor(list(combinations(range(E), per_token)))
    return Routing.from_topk(torch.ones(sets.shape), expert=sets, num_experts=E)


def bank(experts: int, *, hidden: int = F, dim: int = D) -> GroupedExperts:
    feed = FeedForwardConfig(hidden=hidden, activation=ReLU())
    made = GroupedExperts(ExpertShape(experts, dim, feed, bias=False))
    for matrix in made.parameters():
        nn.init.normal_(matrix)
    return made


def there_and_back(way: Dispatcher, *, experts: GroupedExperts, routing: Routing) -> None:
    x = torch.randn(routing.num_tokens, D, requires_grad=True)
    weighed = replace(routing, weight=routing.weight.clone().requires_grad_())
    way.run_experts(x, routing=weighed, experts=experts).sum().backward()


def mesh_row(name: str, *, over: Group, slices: Group, data: Group) -> dict[str, Any]:
    """Rows and gradients of one way to lay the experts over the ranks."""
    places, cuts, copies = group_size(over), group_size(slices), group_size(data)
    routing, experts = every_set(2), bank(E // places, hidden=F // cuts)
    names: dict[str, Group] = {"expert": over, "model": slices, "data": data}
    with CommunicationCounter(axes=names) as wire:
        there_and_back(
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
        "counted": {axis: wire.total_bytes(axis=axis, dtype=FLOAT) for axis in names},
        "closed": {"expert": 2 * form.expert, "model": 2 * form.model, "data": form.data},
        "rows_leaving_node": wire.inter_node_bytes(ranks_per_node=NODE, dtype=FLOAT)
        - sum(
            line.bytes
            for line in wire.entries()
            if line.axis == "data" and line.destination // NODE != distributed.get_rank() // NODE
        ),
    }


def meshes() -> list[dict[str, Any]]:
    fold = Folds.made()
    inner = split_group(fold.nodes.inner, inner_size=2)
    return [
        mesh_row("expert 8", over=fold.world, slices=None, data=None),
        mesh_row("data 2 x expert 4", over=fold.nodes.inner, slices=None, data=fold.nodes.outer),
        mesh_row(
            "data 2 x expert 2 x model 2",
            over=inner.outer,
            slices=inner.inner,
            data=fold.nodes.outer,
        ),
    ]


def folding() -> list[dict[str, Any]]:
    """Expert parallelism of degree 4 beside attention cut in two: over data, or folded."""
    fold, found = Folds.made(), []
    rows = DispatchedTokens(tokens=comb(E, 2), experts_per_token=2, dim=D, itemsize=4)
    for name, over, near in (
        ("unfolded: every second rank", fold.pairs.outer, 2),
        ("folded: four in a row", fold.nodes.inner, 4),
    ):
        with CommunicationCounter() as wire:
            way = AllToAllDispatcher(over)
            there_and_back(way, experts=bank(E // 4), routing=every_set(2))
        found.append(
            {
                "expert_group": name,
                "counted_leaving": wire.inter_node_bytes(ranks_per_node=NODE, dtype=FLOAT),
                "closed_leaving": 2
                * all_to_all_inter_node_bytes(rows, ranks=4, ranks_per_node=near),
                "counted": wire.total_bytes(dtype=FLOAT),
                "closed": 2 * all_to_all_bytes(rows, ranks=4),
            }
        )
    return found


def narrow() -> dict[str, Any]:
    """A layer whose rows travel whole, and one whose rows travel at a quarter of the width."""
    counted = {}
    for name, config in {
        "whole": MoE(experts=E, select=TopK(k=2)),
        "narrow": MoE(experts=E, select=TopK(k=2), dispatch_projection=DownProjection(ratio=0.25)),
    }.items():
        torch.manual_seed(0)
        feed = FeedForwardConfig(hidden=F, activation=ReLU())
        layer = MoELayer(
            config, dim=D, feed_forward=feed, bias=False, layer_index=LayerIndex("moe")
        )
        torch.manual_seed(1)
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter)
        layer.experts = bank(E // RANKS, dim=config.dispatch_projection.expert_dim(D))
        layer.dispatcher = AllToAllDispatcher(distributed.group.WORLD)
        torch.manual_seed(2 + distributed.get_rank())
        x = torch.randn(64, D, requires_grad=True)
        with CommunicationCounter() as wire:
            answer = layer(x, context=TokenContext.unbatched(64), router_state=RouterState())
            answer.out.sum().backward()
        counted[name] = wire.total_bytes(kind="all-to-all", dtype=FLOAT)
    return {**counted, "ratio": counted["narrow"] / counted["whole"], "closed": 0.25}


def hops() -> list[dict[str, Any]]:
    """What crosses between nodes, flat and in two hops."""
    fold, found = Folds.made(), []
    for per_token in (1, 2, 4):
        routing = every_set(per_token)
        rows = DispatchedTokens(
            tokens=routing.num_tokens, experts_per_token=per_token, dim=D, itemsize=4
        )
        crossing = {}
        for name, way in (
            ("flat", AllToAllDispatcher(fold.world)),
            (
                "two_hops",
                hierarchical_dispatcher(inter_node=fold.nodes.outer, intra_node=fold.nodes.inner),
            ),
        ):
            with CommunicationCounter() as wire:
                there_and_back(way, experts=bank(E // RANKS), routing=routing)
            crossing[name] = wire.inter_node_bytes(ranks_per_node=NODE)
        flat = 2 * all_to_all_inter_node_bytes(rows, ranks=RANKS, ranks_per_node=NODE)
        once = 2 * hierarchical_inter_node_bytes(rows, experts=E, nodes=RANKS // NODE)
        # an edge that crosses tells its expert and weight, and gets the weight's gradient
        edges = rows.tokens * per_token // 2 * (8 + 4 + 4)
        found.append(
            {
                "per_token": per_token,
                **{f"counted_{name}": size for name, size in crossing.items()},
                "closed_flat": flat + NODE * 8,
                "closed_two_hops": once + edges + 2 * 8,
            }
        )
    return found


def lending() -> list[dict[str, Any]]:
    """Two experts, each cut over four ranks: rows repeated, or slices and experts lent."""
    fold, found = Folds.made(), []
    over, slices, hidden = fold.nodes.outer, fold.nodes.inner, 96
    ways = possible_gather_degrees(2, slices=NODE)
    for factor in range(1, 9):
        tokens = 8 * factor
        expert = (torch.arange(tokens) % 2)[:, None]
        routing = Routing.from_topk(torch.ones(tokens, 1), expert=expert, num_experts=2)
        experts = bank(1, hidden=hidden // NODE)
        step = StepLoad(
            torch.full((2, NODE, 2), tokens // 2),
            row_bytes=4 * D,
            bank_bytes=4 * sum(matrix.numel() for matrix in experts.parameters()),
        )
        row: dict[str, Any] = {"capacity_factor": factor, "counted": {}, "closed": {}}
        for way in ways:
            dispatcher = AdaptiveDispatcher(
                over, slice_group=slices, costs=BY_BYTES, candidates=[way]
            )
            with CommunicationCounter() as wire:
                there_and_back(dispatcher, experts=experts, routing=routing)
            moved = step.traffic(way)
            row["counted"][label(way)] = wire.total_bytes(dtype=FLOAT)
            row["closed"][label(way)] = 2 * (2 * moved.rows + 2 * moved.copies + moved.weights)
        free = AdaptiveDispatcher(over, slice_group=slices, costs=BY_BYTES)
        x = torch.randn(tokens, D)
        row["chosen"] = label(free.choose(x, routing=routing, experts=experts))
        found.append(row)
    return found


def label(way: GatherDegrees) -> str:
    """Tutel's r: how often a row is repeated; 0 where weights are all that travels."""
    return "r=0" if way.experts > 1 else f"r={NODE // way.slices}"


def alike(part: Any) -> Any:
    """Run a part on all ranks, which must have counted the same."""
    every = run_on_ranks(RANKS, part, timeout_s=300)
    if any(found != every[0] for found in every):
        raise ValueError(f"ranks counted differently in {part.__name__}: {every}")
    return every[0]


def summed(part: Any) -> dict[str, Any]:
    """Run a part whose routing is not even: the sums over ranks."""
    every = run_on_ranks(RANKS, part, timeout_s=300)
    whole, less = (sum(found[name] for found in every) for name in ("whole", "narrow"))
    return {"whole": whole, "narrow": less, "ratio": less / whole, "closed": every[0]["closed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wire.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/guide/communication-volume.md"))
    options = parser.parse_args()
    result = {
        "ranks": RANKS,
        "ranks_per_node": NODE,
        "row_bytes": 4 * D,
        "meshes": alike(meshes),
        "folding": alike(folding),
        "narrow": summed(narrow),
        "hops": alike(hops),
        "lending": alike(lending),
    }
    write_result(options.out, result)
    write_page(options.page, result)


if __name__ == "__main__":
    main()
