"""Law: dropping an edge changes the output of its own token and of no other."""

import pytest
import torch

from moe.variants import DIM, LAYER_PARTS, layer, mixture, run
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Limit
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing


class DropOne(Limit):
    """Drops one edge by number (none if negative)."""

    edge: int

    def __call__(
        self, routing: Routing, _router: RouterContext, _batch_group: BatchGroup, /
    ) -> Routing:
        return routing.drop(torch.arange(routing.expert.numel()) == self.edge)


@pytest.mark.parametrize(
    "select",
    [
        *("switch", "top2", "top2-none", "top3-after", "gshard", "sigmoid", "hash", "dense-all"),
        *("top-p", "threshold", "expert-choice"),
    ],
)
@pytest.mark.parametrize("edge", [0, 7, 19])
def test_a_dropped_edge_changes_only_its_token(select, edge):
    _drops(mixture(select, "dropless"), edge=edge)


@pytest.mark.parametrize("body", LAYER_PARTS)
def test_a_dropped_edge_changes_only_its_token_for_every_kind_of_expert(body):
    _drops(mixture("top2", "dropless").replace(**LAYER_PARTS[body]), edge=7)


def _drops(config: MoE, *, edge: int) -> None:
    config = config.replace(limit=DropOne(edge=-1))
    whole = layer(config)
    x = torch.randn(20, DIM)
    before, record = run(whole, x)
    while record.routing.expert[edge] >= config.experts:
        edge += 1  # a null expert adds nothing, with its edge or without
    short = layer(config.replace(limit=DropOne(edge=edge)))
    short.load_state_dict(whole.state_dict())
    after, _ = run(short, x)
    token = int(record.routing.token[edge])
    changed = (before - after).abs().amax(1) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [token]


def test_a_token_without_edges_has_a_zero_output():
    config = mixture("switch", "dropless").replace(limit=DropOne(edge=3))
    out, _ = run(layer(config), torch.randn(6, DIM))
    assert torch.equal(out[3], torch.zeros(DIM))
    assert (out.abs().amax(1) > 0).sum() == 5
