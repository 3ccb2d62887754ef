"""Attention cases, computed by one rank or by several context ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_backend import AttentionBackend, LocalAttention, QueryKeyValue
from moesaic.nn.attention_scores import AttentionMask, AttentionScores, RelativeBuckets, ScoreBias
from moesaic.nn.packing import Packing
from moesaic.parallel.context_parallel import SequenceSharder, TokenSplit, contiguous_split

WIDTH = 4


@dataclass(frozen=True, slots=True)
class Case:
    """Self-attention of rows of ``lengths`` tokens, or their cross-attention to ``source`` rows.

    ``mask`` are further fields of ``AttentionMask``, ``parts`` those of ``AttentionScores``.
    """

    lengths: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    source: Sequence[int] | None = None
    mask: Mapping[str, int] = field(default_factory=dict)
    parts: Sequence[str] = ()

    def scores(self) -> AttentionScores:
        """Return what attention needs beside queries, keys and values."""
        draw = torch.Generator().manual_seed(1)
        sinks = torch.randn(self.heads, generator=draw).requires_grad_()
        table = torch.randn(6, self.heads, generator=draw).requires_grad_()
        buckets = RelativeBuckets(number=6, max_distance=9, bidirectional=not self.causal)
        possible = {"scale": 0.8, "softcap": 1.5, "sinks": sinks, "bias": ScoreBias(table, buckets)}
        mask = AttentionMask(self.causal and self.source is None, **self.mask)
        return AttentionScores(mask, **{part: possible[part] for part in self.parts})


ROWS, OTHERS = (5, 1, 7, 2, 4), (3, 6, 1, 0, 8)
CASES = {
    "causal": Case(ROWS),
    "bidirectional": Case(ROWS, causal=False),
    "one long row": Case((17,)),
    "nothing padded": Case((6, 6, 6)),
    "fewer tokens than ranks": Case((2,)),
    "a row without tokens": Case((0, 3, 4, 0), causal=False),
    "as many kv heads": Case(ROWS, kv_heads=4),
    "one kv head": Case(ROWS, kv_heads=1),
    "heads that do not divide": Case(ROWS, heads=6, kv_heads=3),
    "uneven heads": Case(ROWS, heads=5, kv_heads=5),
    "window": Case(ROWS, mask={"window": 3}),
    "window on both sides": Case(ROWS, causal=False, mask={"window": 2}),
    "window of one long row": Case((17,), mask={"window": 5}, parts=("sinks", "scale")),
    "chunks": Case((17, 4), mask={"chunk": 4, "window": 3}),
    "bidirectional chunks": Case((17, 4), causal=False, mask={"chunk": 5}),
    "sinks": Case(ROWS, parts=("sinks",)),
    "bias": Case(ROWS, parts=("bias", "scale")),
    "bidirectional bias": Case(ROWS, causal=False, heads=6, kv_heads=3, parts=("bias",)),
    "soft cap": Case(ROWS, parts=("softcap", "sinks", "bias"), mask={"window": 4}),
    "cross": Case(ROWS, source=OTHERS, parts=("scale",)),
    "cross, one kv head": Case(ROWS, kv_heads=1, source=OTHERS),
    "cross, heads that do not divide": Case(ROWS, heads=12, kv_heads=3, source=OTHERS),
    "cross, few tokens": Case((1, 0), source=(0, 1)),
}
Outcome = list[Tensor]


def packing_of(lengths: Sequence[int]) -> Packing:
    """Return the packing of right-padded rows."""
    return Packing.from_mask(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def attend_locally(case: Case) -> Outcome:
    """Return the outputs of all tokens, and the gradients of what enters attention."""
    return _attend(case, backend=LocalAttention(), sharding=lambda packing: packing)


def attend_on_rank(
    case: Case,
    *,
    backend: AttentionBackend,
    rank: int,
    ranks: int,
    tensor_ranks: int = 1,
    token_split: TokenSplit = contiguous_split,
) -> Outcome:
    """Return the same for the tokens of one rank, at their places in the batch."""
    return _attend(
        case,
        backend=backend,
        sharding=SequenceSharder(rank, ranks, tensor_ranks=tensor_ranks, token_split=token_split),
    )


def _attend(
    case: Case, *, backend: AttentionBackend, sharding: Callable[[Packing], Packing]
) -> Outcome:
    draw = torch.Generator().manual_seed(0)
    whole = packing_of(case.lengths)
    source_packing = whole if case.source is None else packing_of(case.source)
    query = torch.randn(whole.num_tokens, case.heads, WIDTH, generator=draw)
    key, value = torch.randn(2, source_packing.num_tokens, case.kv_heads, WIDTH, generator=draw)
    weight = torch.randn(whole.num_tokens, case.heads * WIDTH, generator=draw)
    scores = case.scores()
    learned = [scores.sinks, scores.bias.table if scores.bias else None]
    leaves = [x.requires_grad_() for x in (query, key, value, *learned) if x is not None]
    packing, local_source = sharding(whole), sharding(source_packing)
    queries, keys = _local_indices(packing, whole), _local_indices(local_source, source_packing)
    if case.source is None:
        heads = QueryKeyValue(query[queries], key[keys], value[keys])
        found = backend.self_attention(heads, packing=packing, scores=scores)
    else:
        source = backend.project_source(key[keys], value[keys], packing=local_source)
        mask = local_source.key_mask
        found = backend.cross_attention(
            query[queries], packing=packing, source=source, mask=mask, scores=scores
        )
    (found * weight[queries]).sum().backward()
    out = torch.zeros_like(weight).index_copy(0, queries, found.detach())
    return [out, *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def _local_indices(packing: Packing, whole: Packing) -> Tensor:
    """Return the indices of this context rank's tokens in the whole stream."""
    return torch.searchsorted(whole.index, packing.index[packing.gathered_tokens])
