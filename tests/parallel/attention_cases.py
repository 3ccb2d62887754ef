"""Cases in which tokens look at each other, held by one rank or by several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_backend import AttentionBackend, LocalAttention, QueryKeyValue
from moesaic.nn.packing import Packing
from moesaic.parallel.context_parallel import SequenceSharder, TokenSplit, contiguous_split

WIDTH = 4


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of ``lengths`` tokens look at themselves, or at rows of ``source`` tokens."""

    lengths: Sequence[int]
    heads: int = 4
    groups: int = 2
    causal: bool = True
    source: Sequence[int] | None = None


ROWS, OTHERS = (5, 1, 7, 2, 4), (3, 6, 1, 0, 8)
CASES = {
    "causal": Case(ROWS),
    "bidirectional": Case(ROWS, causal=False),
    "one long row": Case((17,)),
    "nothing padded": Case((6, 6, 6)),
    "fewer tokens than ranks": Case((2,)),
    "a row without tokens": Case((0, 3, 4, 0), causal=False),
    "a head for each": Case(ROWS, groups=4),
    "one key for all": Case(ROWS, groups=1),
    "heads that do not divide": Case(ROWS, heads=6, groups=3),
    "uneven heads": Case(ROWS, heads=5, groups=5),
    "cross": Case(ROWS, source=OTHERS),
    "cross, one key for all": Case(ROWS, groups=1, source=OTHERS),
    "cross, heads that do not divide": Case(ROWS, heads=12, groups=3, source=OTHERS),
    "cross, few tokens": Case((1, 0), source=(0, 1)),
}
Outcome = list[Tensor]


def packing_of(lengths: Sequence[int]) -> Packing:
    """Return the packing of right-padded rows."""
    return Packing.from_mask(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def look_here(case: Case) -> Outcome:
    """Return what all tokens find, and the gradients of queries, keys and values."""
    return _look(case, looking=LocalAttention(), deal=lambda packing: packing)


def look_as(
    case: Case,
    *,
    looking: AttentionBackend,
    rank: int,
    ranks: int,
    lanes: int = 1,
    cut: TokenSplit = contiguous_split,
) -> Outcome:
    """Return the same of the tokens of one rank, at their places in the batch; zeros elsewhere."""
    return _look(
        case,
        looking=looking,
        deal=SequenceSharder(rank, ranks, tensor_ranks=lanes, token_split=cut),
    )


def _look(case: Case, *, looking: AttentionBackend, deal: Callable[[Packing], Packing]) -> Outcome:
    draw = torch.Generator().manual_seed(0)
    whole = packing_of(case.lengths)
    asked_at = whole if case.source is None else packing_of(case.source)
    query = torch.randn(whole.num_tokens, case.heads, WIDTH, generator=draw)
    key, value = torch.randn(2, asked_at.num_tokens, case.groups, WIDTH, generator=draw)
    weight = torch.randn(whole.num_tokens, case.heads * WIDTH, generator=draw)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    packing, other = deal(whole), deal(asked_at)
    mine, its = _held(packing, whole), _held(other, asked_at)
    if case.source is None:
        heads = QueryKeyValue(query[mine], key[its], value[its])
        found = looking.self_attention(heads, packing=packing, causal=case.causal)
    else:
        source = looking.project_source(key[its], value[its], packing=other)
        mask = other.key_mask
        found = looking.cross_attention(query[mine], packing=packing, source=source, mask=mask)
    (found * weight[mine]).sum().backward()
    out = torch.zeros_like(weight).index_copy(0, mine, found.detach())
    return [out, *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def _held(packing: Packing, whole: Packing) -> Tensor:
    """Return where the tokens that meet here are in the whole stream."""
    return torch.searchsorted(whole.index, packing.index[packing.gathered_tokens])
