"""What crosses a boundary arrives as it was handed on, gradients included."""

import pytest
import torch

from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import PreGatedRouting, RecurrentRouting
from moesaic.moe.select import TopK
from moesaic.parallel.partial_forward import BlockRange, StageIO
from moesaic.parallel.stage_serializer import (
    LocalTokens,
    StageBoundary,
    StageSerializer,
    attach_loss,
    connect_graph,
    round_up_rows,
)
from moesaic.testing.tiny_models import tiny_model_config

LINKS = {"recurrent": RecurrentRouting(width=6), "pre-gated": PreGatedRouting()}
HELD = (LocalTokens(5, 3), LocalTokens(2, 7), LocalTokens(0, 0))


def _wire(link: str, *, stop: int) -> StageSerializer:
    moe = MoE(experts=4, select=TopK(k=2), cross_layer=LINKS[link])
    config = tiny_model_config(moe=moe, layers=2)
    boundary = StageBoundary.after(BlockRange.between(0, stop, config=config), config=config)
    return StageSerializer.of(boundary, dim=config.dim, dtype=torch.float32, tokens=HELD)


def _handed(link: str, *, held: LocalTokens, stop: int) -> StageIO:
    def draw(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, requires_grad=True)

    memory = draw(held.source, 16) if stop >= 2 else None
    rows = {1: held.source, 2: None, 3: held.target}[stop]
    if rows is None:
        return StageIO(encoder_states=memory)
    hidden = draw(rows, 6) if link == "recurrent" else None
    logits = draw(rows, 4) if link == "pre-gated" else None
    return StageIO(draw(rows, 16), hidden, logits, memory)


FIELDS = ("x", "router_hidden", "router_logits", "encoder_states")


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("held", HELD, ids=str)
def test_what_arrives_is_what_was_handed_on(link: str, stop: int, held: LocalTokens) -> None:
    wire, given = _wire(link, stop=stop), _handed(link, held=held, stop=stop)
    crossed = wire.pack(given, term=torch.zeros(()))
    assert [c.shape for c in crossed] == [blank.shape for blank in wire.empty_buffers("cpu")]
    found = wire.unpack(crossed, tokens=held)
    there = [(getattr(given, name), getattr(found, name)) for name in FIELDS]
    for before, after in there:
        assert (before is None) == (after is None)
        if before is not None:
            assert torch.equal(before, after)
    pulls = [torch.randn_like(after) for _, after in there if after is not None]
    torch.autograd.backward([after for _, after in there if after is not None], pulls)
    for before, pull in zip([b for b, _ in there if b is not None], pulls, strict=True):
        torch.testing.assert_close(before.grad, pull)


def test_logits_that_are_not_there_yet_cross_as_zeros_with_a_gradient() -> None:
    wire = _wire("pre-gated", stop=1)
    x = torch.randn(5, 16, requires_grad=True)
    rows, carried = wire.pack(StageIO(x), term=torch.zeros(()))
    assert carried.requires_grad
    assert not carried.any()
    received = [t.detach().requires_grad_() for t in (rows, carried)]
    found = wire.unpack(received, tokens=HELD[0])
    assert found.x is not None
    found.x.sum().backward()
    assert all(t.grad is not None for t in received)


def test_a_term_that_is_attached_gets_the_gradient_one_whatever_follows() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, weight.square())
    assert torch.equal(y, x)
    (7.0 * y).sum().backward()
    assert x.grad is not None
    assert (x.grad == 7.0).all()
    assert weight.grad == 4.0


def test_what_is_hung_on_another_gives_it_a_gradient_of_zeros() -> None:
    x, other = torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    connect_graph(x, other).sum().backward()
    assert other.grad is not None
    assert not other.grad.any()


def test_room_is_at_most_an_eighth_too_much_and_of_few_sizes() -> None:
    rows = range(1, 5000)
    assert all(n <= round_up_rows(n) <= max(n * 9 / 8, 1) for n in rows)
    assert len({round_up_rows(n) for n in rows}) < 90
    assert round_up_rows(0) == 1
