"""Sequence sharding: every token is held by exactly one rank, with balanced work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nn.packing import Packing, TokenSpan
from moesaic.parallel import context_parallel
from moesaic.parallel.context_parallel import (
    SequenceSharder,
    TokenSplit,
    contiguous_split,
    zigzag_split,
)
from parallel.attention_cases import packing_of

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=5)


@given(lengths=LENGTHS, parts=st.integers(1, 5), tensor_ranks=st.integers(1, 3))
@pytest.mark.parametrize("token_split", [contiguous_split, zigzag_split])
def test_every_token_is_held_once_and_ranks_are_balanced(
    token_split: TokenSplit, lengths: list[int], parts: int, tensor_ranks: int
) -> None:
    whole, ranks = packing_of(lengths), parts * tensor_ranks
    packings = [
        SequenceSharder(rank, ranks, tensor_ranks=tensor_ranks, token_split=token_split)(whole)
        for rank in range(ranks)
    ]
    local = [packing.index[packing.local_tokens] for packing in packings]
    assert torch.cat(local).sort().values.tolist() == whole.index.tolist()
    sizes = [len(index) for index in local]
    assert max(sizes) - min(sizes) <= (
        1 if tensor_ranks == 1 or token_split is contiguous_split else 2
    )
    for part in range(parts):
        gathered = packings[part * tensor_ranks].index[
            packings[part * tensor_ranks].gathered_tokens
        ]
        assert (
            gathered.tolist()
            == torch.cat(local[part * tensor_ranks : (part + 1) * tensor_ranks]).tolist()
        )


@given(lengths=LENGTHS, parts=st.integers(2, 4))
@pytest.mark.parametrize("token_split", [contiguous_split, zigzag_split])
def test_spans_are_the_tokens_of_every_context_rank(
    token_split: TokenSplit, lengths: list[int], parts: int
) -> None:
    whole = packing_of(lengths)
    for rank in range(parts):
        packing = SequenceSharder(rank, parts, token_split=token_split)(whole)
        assert packing.partition is not None
        indices = [
            run.row * packing.length + run.position + step
            for run in packing.partition.spans[rank]
            for step in range(run.length)
        ]
        assert indices == packing.index[packing.local_tokens].tolist()


def test_no_span_is_longer_than_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_parallel, "MAX_RUN_LENGTH", 3)
    partition = SequenceSharder(1, 2)(packing_of([9, 4])).partition
    assert partition is not None
    assert partition.spans[1] == (
        TokenSpan(0, 7, 0, 2),
        TokenSpan(1, 0, 2, 3),
        TokenSpan(1, 3, 5, 1),
    )


def test_zigzag_balances_the_causal_pairs_of_a_long_row() -> None:
    def pairs(token_split: TokenSplit, part: int) -> int:
        packing = SequenceSharder(part, 4, token_split=token_split)(packing_of([64]))
        return int((packing.position[packing.local_tokens] + 1).sum())

    assert len({pairs(zigzag_split, part) for part in range(4)}) == 1
    assert pairs(contiguous_split, 3) > 6 * pairs(contiguous_split, 0)


@pytest.mark.parametrize("full", [True, False])
def test_padding_and_packing_invert_each_other_after_a_zigzag_split(full: bool) -> None:
    whole = packing_of([6, 6] if full else [6, 3])
    packing = SequenceSharder(0, 2, token_split=zigzag_split)(whole)
    x = torch.randn(whole.num_tokens, 3)
    assert torch.equal(packing.pack(packing.pad(x)), x)
    expected = torch.zeros(12, 3).index_copy(0, packing.index, x)
    assert torch.equal(packing.pad(x).flatten(0, 1), expected)


def test_one_rank_holds_all_tokens() -> None:
    whole: Packing = packing_of([3, 1])
    assert SequenceSharder(0, 1)(whole) is whole
