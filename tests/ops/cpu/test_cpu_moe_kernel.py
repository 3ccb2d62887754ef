"""The compiled mixture equals its unfused kernel, values and gradients, whatever the edges are."""

import pytest
import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.nn.feed_forward import GELU, Activation, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.cpu.cpu_library import load_library
from moesaic.ops.cpu.cpu_moe_kernel import CPUMoEKernel
from moesaic.ops.grouped_gemm import FeedForwardWeights, SequentialGEMM
from moesaic.ops.moe_kernel import Edges, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

LIBRARY = load_library().library
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=load_library().reason)

E = 4
UNFUSED = UnfusedMoEKernel(SequentialGEMM())
ACTIVATIONS = {"relu": ReLU(), "relu2": SquaredReLU(), "gelu": GELU(), "swiglu": SwiGLU()}


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _topk(tokens: int, k: int, expert: torch.Tensor) -> Edges:
    token = torch.arange(tokens).repeat_interleave(k)
    weight = torch.rand(tokens * k, generator=_draw(1)) * (expert < E)
    return Edges(token, weight, group_by_expert(expert, num_experts=E), tokens, k)


def _loose() -> Edges:
    """Edges in no order; token 5 has none, token 2 has three, one edge leads nowhere."""
    token = torch.tensor([2, 0, 4, 2, 1, 3, 2, 0])
    expert = torch.tensor([1, 0, 3, 0, E, 1, 3, 3])
    return Edges(
        token, torch.rand(8, generator=_draw(1)), group_by_expert(expert, num_experts=E), 6, 0
    )


ROUTES = {
    "balanced": lambda: _topk(30, 2, torch.arange(60) % E),
    "skewed": lambda: _topk(211, 3, (torch.randn(633, generator=_draw()) ** 2).long().clamp(max=3)),
    "all-to-one": lambda: _topk(130, 1, torch.full((130,), 2)),
    "some-dropped": lambda: _topk(20, 2, torch.arange(40) % (E + 1)),
    "all-dropped": lambda: _topk(5, 1, torch.full((5,), E)),
    "few-rows": lambda: _topk(9, 2, torch.arange(18) % 3),
    "one-token": lambda: _topk(1, 2, torch.tensor([3, 1])),
    "no-tokens": lambda: _topk(0, 2, torch.empty(0, dtype=torch.long)),
    "loose": _loose,
}
SIZES = {"even": (16, 32), "odd": (13, 7), "wide": (150, 67), "deep": (530, 3)}


def _answers(kernel, edges: Edges, activation: Activation, sizes=(16, 32), *, half="", like=None):
    """Output and gradients; ``half`` names what is bfloat16: x, weights or both."""
    dim, hidden = sizes
    draw = _draw(2)
    x = torch.randn(edges.num_tokens, dim, generator=draw)
    up = torch.randn(E, dim, activation.width(hidden), generator=draw) * dim**-0.5
    down = torch.randn(E, hidden, dim, generator=draw) * hidden**-0.5
    leaves = [x.bfloat16() if "x" in half else x, edges.weight.clone()]
    leaves += [w.bfloat16() if "weights" in half else w for w in (up, down)]
    if like is not None:
        leaves = [leaf.to(like) for leaf in leaves]
    x, weight, up, down = (leaf.requires_grad_() for leaf in leaves)
    placed = Edges(edges.token, weight, edges.groups, edges.num_tokens, edges.per_token)
    out = kernel(x, edges=placed, weights=FeedForwardWeights(up, down), activation=activation)
    pull = torch.randn(out.shape, generator=_draw(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (x, weight, up, down), pull)]


def _definition(x, *, edges, weights, activation):
    """The sum over edges, one edge at a time, differentiated by autograd alone."""
    out = torch.zeros_like(x)
    for place, edge in enumerate(edges.groups.order.tolist()):
        if place < int(edges.groups.offsets[-1]):
            e = int((edges.groups.offsets <= place).sum())
            token = edges.token[edge]
            row = activation(x[token] @ weights.up[e]) @ weights.down[e]
            out = out.index_add(0, token[None], (edges.weight[edge] * row)[None])
    return out + 0 * (x.sum() + edges.weight.sum() + weights.up.sum() + weights.down.sum())


@pytest.fixture
def fused() -> CPUMoEKernel:
    return CPUMoEKernel(LIBRARY, UNFUSED)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_it_equals_the_composed_path_with_gradients(fused, route, activation):
    edges, function = ROUTES[route](), ACTIVATIONS[activation]
    want = _answers(UNFUSED, edges, function)
    for got, expected in zip(_answers(fused, edges, function), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("route", ["skewed", "few-rows", "loose"])
def test_any_size_will_do(fused, route, size):
    edges = ROUTES[route]()
    want = _answers(UNFUSED, edges, SwiGLU(), SIZES[size])
    for got, expected in zip(_answers(fused, edges, SwiGLU(), SIZES[size]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ["few-rows", "some-dropped", "loose"])
def test_it_equals_the_definition_in_double_precision(fused, route):
    edges = ROUTES[route]()
    want = _answers(_definition, edges, GELU(), like=torch.float64)
    for got, expected in zip(_answers(fused, edges, GELU()), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", ["x", "weights", "x and weights"])
@pytest.mark.parametrize("route", ["skewed", "few-rows", "loose"])
def test_halves_are_widened_and_summed_in_float32(fused, route, half):
    edges = ROUTES[route]()
    got = _answers(fused, edges, SwiGLU(), half=half)
    rounded = [t.float() for t in _answers(fused, edges, SwiGLU())]  # the dtype alone is asked here
    assert [t.dtype == torch.bfloat16 for t in got] == [
        *("x" in half, "x" in half, False, "weights" in half, "weights" in half)
    ]
    for one, other in zip(got, rounded, strict=True):
        torch.testing.assert_close(
            one.float(), other, rtol=0.05, atol=0.05 * float(other.abs().max())
        )


def test_halved_weights_give_what_the_same_numbers_give_in_float32(fused):
    edges = ROUTES["skewed"]()
    x, up, down = torch.randn(211, 16), torch.randn(E, 16, 64).bfloat16(), torch.randn(E, 32, 16)
    down = down.bfloat16()
    got = fused(x, edges=edges, weights=FeedForwardWeights(up, down), activation=SwiGLU())
    wide = FeedForwardWeights(up.float(), down.float())
    assert torch.equal(got, fused(x, edges=edges, weights=wide, activation=SwiGLU()))


@pytest.mark.parametrize("route", ["skewed", "all-to-one", "few-rows", "loose"])
def test_the_number_of_threads_changes_no_bit(fused, route, monkeypatch):
    edges = ROUTES[route]()
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(_answers(fused, edges, SwiGLU(), (150, 67)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_alone_gets_the_same_bits_as_in_a_batch(fused):
    weights = FeedForwardWeights(torch.randn(E, 40, 48), torch.randn(E, 24, 40))
    x, expert = torch.randn(100, 40), torch.randint(0, E, (200,), generator=_draw())

    def mix(rows, chosen):
        edges = _topk(rows.shape[0], 2, chosen)
        edges = Edges(edges.token, torch.ones_like(edges.weight), edges.groups, rows.shape[0], 2)
        return fused(rows, edges=edges, weights=weights, activation=SwiGLU())

    batch = mix(x, expert)
    alone = [mix(x[t : t + 1], expert[2 * t : 2 * t + 2]) for t in range(100)]
    assert torch.equal(batch, torch.cat(alone))


@pytest.mark.parametrize("wanted", ["x", "weight", "up", "down", "nothing"])
def test_only_what_is_wanted_gets_a_gradient(fused, wanted):
    edges = ROUTES["skewed"]()
    leaves = {
        "x": torch.randn(211, 16),
        "weight": edges.weight.clone(),
        "up": torch.randn(E, 16, 64) / 4,
        "down": torch.randn(E, 32, 16) / 5,
    }
    if wanted != "nothing":
        leaves[wanted].requires_grad_()
    results = []
    for kernel in (fused, UNFUSED):
        placed = Edges(edges.token, leaves["weight"], edges.groups, 211, 3)
        weights = FeedForwardWeights(leaves["up"], leaves["down"])
        out = kernel(leaves["x"], edges=placed, weights=weights, activation=SwiGLU())
        assert out.requires_grad == (wanted != "nothing")
        back = torch.autograd.grad(out.square().mean(), leaves[wanted]) if out.requires_grad else ()
        results.append((out.detach(), *back))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_strided_inputs_and_expanded_gradients_are_fine(fused):
    edges = ROUTES["balanced"]()
    x = torch.randn(16, 30).t().requires_grad_()
    up, down = torch.randn(E, 64, 16).transpose(1, 2), torch.randn(E, 16, 32).transpose(1, 2)
    outs = [
        m(x, edges=edges, weights=FeedForwardWeights(up, down), activation=SwiGLU())
        for m in (fused, UNFUSED)
    ]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_backward_can_be_run_twice(fused):
    edges = ROUTES["skewed"]()
    x = torch.randn(211, 16, requires_grad=True)
    weights = FeedForwardWeights(torch.randn(E, 16, 64, requires_grad=True), torch.randn(E, 32, 16))
    loss = fused(x, edges=edges, weights=weights, activation=SwiGLU()).square().sum()
    first, second = (
        torch.autograd.grad(loss, (x, weights.up), retain_graph=again) for again in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_x_the_pre_activation_and_a_few_numbers_per_edge_are_saved(fused):
    saved = []
    edges = ROUTES["balanced"]()
    x = torch.randn(30, 16, requires_grad=True)
    weights = FeedForwardWeights(torch.randn(E, 16, 64), torch.randn(E, 32, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(x, edges=edges, weights=weights, activation=SwiGLU())
    held = {t.data_ptr() for t in (x, weights.up, weights.down)}
    kept = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in held)
    # of each of 60 edges the pre-activation, the weight and three int64 indices
    assert kept == 60 * (4 * (64 + 1) + 3 * 8) + 4 * E


def test_biases_and_other_dtypes_take_the_composed_path(fused):
    edges = ROUTES["balanced"]()
    x, up, down = torch.randn(30, 16), torch.randn(E, 16, 64), torch.randn(E, 32, 16)
    biased = FeedForwardWeights(up, down, torch.randn(E, 64), torch.randn(E, 16))
    settings = {"edges": edges, "activation": SwiGLU()}
    assert torch.equal(fused(x, weights=biased, **settings), UNFUSED(x, weights=biased, **settings))
    double = FeedForwardWeights(up.double(), down.double())
    want = UNFUSED(x.double(), weights=double, **settings)
    assert torch.equal(fused(x.double(), weights=double, **settings), want)


def test_a_forked_rank_computes_the_same(fused, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the parent's pool has a thread
    edges = ROUTES["skewed"]()
    want = _answers(fused, edges, SwiGLU())
    for rank in run_on_ranks(2, lambda: [t.numpy() for t in _answers(fused, edges, SwiGLU())]):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(rank, want, strict=True))


@pytest.mark.parametrize("activation", [ReLU(), SquaredReLU()], ids=repr)
def test_what_is_no_number_stays_none(fused, activation):
    x = torch.randn(30, 16, requires_grad=True)
    up, down = torch.randn(E, 16, 32), torch.randn(E, 32, 16)
    up[0, 0, 0] = float("nan")
    out = fused(
        x, edges=ROUTES["balanced"](), weights=FeedForwardWeights(up, down), activation=activation
    )
    assert out.isnan().any()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isnan().any()


def test_an_inference_keeps_nothing_and_gives_the_same_bits(fused):
    x, edges = torch.randn(30, 16), ROUTES["balanced"]()
    up, down = (torch.randn(E, *shape, requires_grad=True) for shape in ((16, 64), (32, 16)))
    trained = fused(x, edges=edges, weights=FeedForwardWeights(up, down), activation=SwiGLU())
    with torch.no_grad():
        quick = fused(x, edges=edges, weights=FeedForwardWeights(up, down), activation=SwiGLU())
    assert torch.equal(trained, quick)


def test_weights_whose_memory_is_freed_are_an_error_and_no_crash(fused):
    up, down = torch.randn(E, 16, 32), torch.randn(E, 32, 16)
    up.untyped_storage().resize_(0)  # as FSDP2 does with what it has gathered
    edges = ROUTES["balanced"]()
    with pytest.raises(RuntimeError, match="a shape but no memory"):
        fused(
            torch.randn(30, 16),
            edges=edges,
            weights=FeedForwardWeights(up, down),
            activation=ReLU(),
        )
