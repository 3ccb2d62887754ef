"""Rows are dispatched at a fraction of the model dim; the router is unchanged."""

import pytest
import torch

from moe.variants import DIM, EXPERTS, layer, run
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.dispatcher import LocalDispatcher
from moesaic.moe.expert_selection import TopK

MIXTURE = MoE(experts=EXPERTS, select=TopK(k=2))
X = torch.randn(9, DIM)


class Counting:
    """A local dispatcher that counts the bytes of dispatched and combined rows."""

    bytes = 0

    def run_experts(self, x, *, routing, experts):
        y = LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        edges = int(routing.load().sum())
        self.bytes += edges * (x.shape[1] + y.shape[1]) * x.element_size()
        return y


def _travelled(config):
    made = layer(config)
    made.dispatcher = Counting()
    run(made, X)
    return made.dispatcher.bytes


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_dispatched_bytes_are_exactly_the_ratio(ratio):
    whole = _travelled(MIXTURE)
    assert whole == 2 * 2 * 9 * DIM * 4
    assert (
        _travelled(MIXTURE.replace(dispatch_projection=DownProjection(ratio=ratio)))
        == ratio * whole
    )


def test_experts_compute_between_the_two_projections():
    made = layer(MIXTURE.replace(dispatch_projection=DownProjection()))
    low = X @ made.dispatch_projection.descend.weight.t()
    assert low.shape == (9, DIM // 4)
    out, record = run(made, X)
    home = torch.zeros_like(low)
    edges = record.routing
    for token, expert, weight in zip(edges.token, edges.expert, edges.weight, strict=True):
        hidden = made.experts.activation(low[token] @ made.experts.up[expert])
        home[token] += weight * (hidden @ made.experts.down[expert])
    wanted = home @ made.dispatch_projection.ascend.weight.t()
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_the_router_reads_unprojected_rows():
    made = layer(MIXTURE.replace(dispatch_projection=DownProjection()))
    plain = layer(MIXTURE)
    plain.router.load_state_dict(made.router.state_dict())
    ours, theirs = run(made, X)[1].routing, run(plain, X)[1].routing
    assert torch.equal(ours.expert, theirs.expert)


def test_both_projections_get_a_gradient():
    made = layer(MIXTURE.replace(dispatch_projection=DownProjection()))
    run(made, X)[0].square().sum().backward()
    for part in (made.dispatch_projection.descend, made.dispatch_projection.ascend):
        assert part.weight.grad.abs().sum() > 0
