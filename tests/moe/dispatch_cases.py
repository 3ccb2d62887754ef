"""Cases for dispatchers over several ranks: the expected outputs and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

from moesaic.distributed.process_groups import Group
from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher, WeightedInputs
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU

E, D, F, K = 8, 6, 4, 2
NOWHERE = E
CASES = {
    "uneven": (3, 5, 1, 4),
    "a rank without tokens": (4, 0, 3, 2),
    "no tokens at all": (0, 0, 0, 0),
    "all to one rank": (3, 2, 4, 1),
    "one expert only": (2, 0, 1, 3),
    "some dropped": (4, 3, 0, 2),
    "all dropped": (2, 1, 1, 0),
    "no fixed number of edges": (3, 4, 0, 2),
    "weights on inputs": (3, 4, 0, 2),
}
FEW = [
    "a rank without tokens",
    "no tokens at all",
    "one expert only",
    "some dropped",
    "weights on inputs",
]


@dataclass(frozen=True, slots=True)
class Result:
    """A rank's part of the output and of all gradients."""

    out: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def groups(size: int) -> tuple[Group, Group]:
    """Groups of ``size`` adjacent ranks, and the groups across them."""
    ranks = range(distributed.get_world_size())
    runs = [list(ranks[i : i + size]) for i in ranks[::size]]
    across = [list(ranks[i::size]) for i in range(size)]
    groups = [distributed.new_subgroups_by_enumeration(each)[0] for each in (runs, across)]
    return groups[0], groups[1]


def routing(case: str, *, tokens: int) -> Routing:
    """The edges of all ranks' tokens in a named case."""
    draw = torch.Generator().manual_seed(7)
    expert = torch.rand(tokens, E, generator=draw).argsort(1)[:, :K]
    weight = torch.rand(tokens, K, generator=draw)
    if case == "all to one rank":
        expert = expert % 2
    if case == "one expert only":
        expert = torch.full_like(expert, 5)
    edges = Routing.from_topk(weight, expert=expert, num_experts=E)
    if case in ("some dropped", "weights on inputs"):
        edges = edges.drop(torch.rand(tokens * K, generator=draw) < 0.4)
    if case == "all dropped":
        edges = edges.drop(torch.ones(tokens * K, dtype=torch.bool))
    if case == "no fixed number of edges":
        chosen = torch.rand(tokens, E, generator=draw) < 0.3
        edges = Routing.from_mask(torch.rand(tokens, E, generator=draw), chosen=chosen)
    return edges


def of_tokens(edges: Routing, *, start: int, count: int) -> Routing:
    """The edges of some of the tokens."""
    own = (edges.token >= start) & (edges.token < start + count)
    return Routing(
        edges.token[own] - start,
        edges.expert[own],
        edges.weight[own],
        count,
        edges.num_experts,
        edges.per_token,
    )


def make_experts(
    *, experts: Sequence[int] = range(E), hidden: slice = slice(0, F)
) -> GroupedExperts:
    """A part of the experts of all ranks."""
    torch.manual_seed(3)
    up, down = torch.randn(E, D, F), torch.randn(E, F, D)
    feed = FeedForwardConfig(hidden=len(range(F)[hidden]), activation=ReLU())
    made = GroupedExperts(ExpertShape(len(experts), D, feed, bias=False))
    made.up = nn.Parameter(up[list(experts)][:, :, hidden].clone())
    made.down = nn.Parameter(down[list(experts)][:, hidden].clone())
    return made


def run_dispatcher(
    dispatcher: Dispatcher, *, experts: GroupedExperts, edges: Routing, x: torch.Tensor
) -> Result:
    """Output and gradients for an upstream gradient of distinct values."""
    x = x.clone().requires_grad_()
    weight = edges.weight.clone().requires_grad_()
    edges = Routing(
        edges.token, edges.expert, weight, edges.num_tokens, edges.num_experts, edges.per_token
    )
    out = dispatcher.run_experts(x, routing=edges, experts=experts)
    (out.float() * upstream(x)).sum().backward()
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, weight)]
    banks = [experts.up.grad, experts.down.grad]
    assert banks[0] is not None
    assert banks[1] is not None
    return Result(out.detach(), *grads, *banks)


def upstream(x: torch.Tensor) -> torch.Tensor:
    """A gradient that is a function of the token's row."""
    return torch.cos(x.detach().float() * 3)


def tokens_of(case: str, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sum(CASES[case]), D, generator=torch.Generator().manual_seed(1)).to(dtype)


@cache
def single_process(case: str, *, dtype: torch.dtype = torch.float32) -> Result:
    """The result of one process with all tokens and experts."""
    x = tokens_of(case, dtype=dtype)
    edges = routing(case, tokens=len(x))
    way = _of_case(LocalDispatcher(), case)
    return run_dispatcher(way, experts=make_experts(), edges=edges, x=x)


def _of_case(dispatcher: Dispatcher, case: str) -> Dispatcher:
    return WeightedInputs(dispatcher) if case == "weights on inputs" else dispatcher


def local_tokens(
    case: str, *, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Routing]:
    """A rank's tokens and edges."""
    sizes = CASES[case]
    start = sum(sizes[:rank])
    x = tokens_of(case, dtype=dtype)
    edges = routing(case, tokens=len(x))
    return x[start:][: sizes[rank]], of_tokens(edges, start=start, count=sizes[rank])


def run_cases(
    dispatcher: Dispatcher, *, experts: Callable[[], GroupedExperts], cases: Sequence[str]
) -> dict[str, Result]:
    """The results of all cases on this rank, by name."""
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    for case in cases:
        x, edges = local_tokens(case, rank=rank)
        way = _of_case(dispatcher, case)
        found[case] = run_dispatcher(way, experts=experts(), edges=edges, x=x)
    return found
