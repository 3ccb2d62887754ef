"""A stage serializer restores what it packs, gradients included."""

import pytest
import torch

from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import PreGatedRouting, RecurrentRouting
from moesaic.moe.expert_selection import TopK
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

ROUTERS = {"recurrent": RecurrentRouting(width=6), "pre-gated": PreGatedRouting()}
TOKENS = (LocalTokens(5, 3), LocalTokens(2, 7), LocalTokens(0, 0))


def _serializer(router_kind: str, *, stop: int) -> StageSerializer:
    moe = MoE(experts=4, select=TopK(k=2), cross_layer=ROUTERS[router_kind])
    config = tiny_model_config(moe=moe, layers=2)
    boundary = StageBoundary.after(BlockRange.between(0, stop, config=config), config=config)
    return StageSerializer.of(boundary, dim=config.dim, dtype=torch.float32, tokens=TOKENS)


def _stage_io(router_kind: str, *, tokens: LocalTokens, stop: int) -> StageIO:
    def draw(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, requires_grad=True)

    memory = draw(tokens.source, 16) if stop >= 2 else None
    rows = {1: tokens.source, 2: None, 3: tokens.target}[stop]
    if rows is None:
        return StageIO(encoder_states=memory)
    hidden = draw(rows, 6) if router_kind == "recurrent" else None
    logits = draw(rows, 4) if router_kind == "pre-gated" else None
    return StageIO(draw(rows, 16), hidden, logits, memory)


FIELDS = ("x", "router_hidden", "router_logits", "encoder_states")


@pytest.mark.parametrize("router_kind", ROUTERS)
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_unpack_restores_what_pack_was_given(
    router_kind: str, stop: int, tokens: LocalTokens
) -> None:
    serializer, given = (
        _serializer(router_kind, stop=stop),
        _stage_io(router_kind, tokens=tokens, stop=stop),
    )
    packed = serializer.pack(given, term=torch.zeros(()))
    assert [c.shape for c in packed] == [buffer.shape for buffer in serializer.empty_buffers("cpu")]
    found = serializer.unpack(packed, tokens=tokens)
    pairs = [(getattr(given, name), getattr(found, name)) for name in FIELDS]
    for before, after in pairs:
        assert (before is None) == (after is None)
        if before is not None:
            assert torch.equal(before, after)
    grads = [torch.randn_like(after) for _, after in pairs if after is not None]
    torch.autograd.backward([after for _, after in pairs if after is not None], grads)
    for before, grad in zip([b for b, _ in pairs if b is not None], grads, strict=True):
        torch.testing.assert_close(before.grad, grad)


def test_missing_router_logits_are_sent_as_zeros_with_a_gradient() -> None:
    serializer = _serializer("pre-gated", stop=1)
    x = torch.randn(5, 16, requires_grad=True)
    rows, router = serializer.pack(StageIO(x), term=torch.zeros(()))
    assert router.requires_grad
    assert not router.any()
    received = [t.detach().requires_grad_() for t in (rows, router)]
    found = serializer.unpack(received, tokens=TOKENS[0])
    assert found.x is not None
    found.x.sum().backward()
    assert all(t.grad is not None for t in received)


def test_an_attached_loss_has_gradient_one_whatever_follows() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, weight.square())
    assert torch.equal(y, x)
    (7.0 * y).sum().backward()
    assert x.grad is not None
    assert (x.grad == 7.0).all()
    assert weight.grad == 4.0


def test_a_connected_tensor_has_a_zero_gradient() -> None:
    x, other = torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    connect_graph(x, other).sum().backward()
    assert other.grad is not None
    assert not other.grad.any()


def test_rows_are_rounded_up_by_at_most_an_eighth_to_few_sizes() -> None:
    rows = range(1, 5000)
    assert all(n <= round_up_rows(n) <= max(n * 9 / 8, 1) for n in rows)
    assert len({round_up_rows(n) for n in rows}) < 90
    assert round_up_rows(0) == 1
