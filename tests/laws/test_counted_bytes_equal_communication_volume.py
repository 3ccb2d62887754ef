"""Law: the counted bytes of expert parallelism equal their closed forms, to the byte."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.distributed as distributed
from dispatch_volume import DispatchedTokens, data_expert_model_bytes
from torch import nn

from moe.dispatch_cases import D, E, F, make_experts
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.process_groups import group_size, split_group
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU

RANKS, K = 4, 2
SETS = torch.tensor(list(combinations(range(E), K)))  # one token for each set: an even load
MESHES = {"expert 4": (1, 4, 1), "data 2 x expert 2": (2, 2, 1), "expert 2 x model 2": (1, 2, 2)}


def _counted(mesh: tuple[int, int, int]) -> dict[str, int]:
    """Bytes of floats over each axis in forward, backward and the all-reduce of gradients."""
    data, _, model_ranks = mesh
    rows = split_group(distributed.group.WORLD, inner_size=RANKS // data)
    model = split_group(rows.inner, inner_size=model_ranks)
    axes = {"data": rows.outer if data > 1 else None, "expert": model.outer, "model": model.inner}
    experts = make_experts(
        experts=range(E // group_size(axes["expert"])), hidden=slice(0, F // model_ranks)
    )
    weight = torch.ones(SETS.shape, requires_grad=True)
    routing = Routing.from_topk(weight, expert=SETS, num_experts=E)
    with CommunicationCounter(axes=axes) as counter:
        x = torch.randn(len(SETS), D, requires_grad=True)
        dispatcher = AllToAllDispatcher(axes["expert"], slice_group=axes["model"])
        dispatcher.run_experts(x, routing=routing, experts=experts).sum().backward()
        for matrix in experts.parameters() if axes["data"] is not None else ():
            assert matrix.grad is not None
            distributed.all_reduce(matrix.grad, group=axes["data"])
    return {axis: counter.total_bytes(axis=axis, dtype=torch.float32) for axis in axes}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_rows_stay_on_the_expert_axis_and_gradients_on_the_data_axis(
    mesh: tuple[int, int, int],
) -> None:
    data, expert, model = mesh
    rows = DispatchedTokens(tokens=len(SETS), experts_per_token=K, dim=D, itemsize=4)
    bytes_ = 2.0 * E * D * F * 4
    form = data_expert_model_bytes(rows, data=data, expert=expert, model=model, expert_bytes=bytes_)
    both = replace(form, expert=2 * form.expert, model=2 * form.model)  # forward and backward
    for found in run_on_ranks(RANKS, _counted, mesh):
        assert found == {"data": both.data, "expert": both.expert, "model": both.model}


def _projected_bytes(ratio: float) -> int:
    config = MoE(experts=E, select=TopK(k=K), dispatch_projection=DownProjection(ratio=ratio))
    feed = FeedForwardConfig(hidden=F, activation=ReLU())
    torch.manual_seed(0)
    layer = MoELayer(config, dim=16, feed_forward=feed, bias=False, layer_index=LayerIndex("layer"))
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    size = ExpertShape(E // RANKS, config.dispatch_projection.expert_dim(16), feed, bias=False)
    layer.experts = GroupedExperts(size)
    layer.dispatcher = AllToAllDispatcher(distributed.group.WORLD)
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(2 + distributed.get_rank()))
    with CommunicationCounter() as counter:
        output = layer(
            x.requires_grad_(), context=TokenContext.unbatched(12), router_state=RouterState()
        )
        output.out.sum().backward()
    return counter.total_bytes(kind="all-to-all", dtype=torch.float32)


def test_a_dispatch_projection_reduces_bytes_by_its_ratio() -> None:
    whole, quarter = (sum(run_on_ranks(RANKS, _projected_bytes, ratio)) for ratio in (1.0, 0.25))
    assert quarter * 4 == whole > 0
