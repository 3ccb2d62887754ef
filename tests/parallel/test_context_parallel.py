"""Every token is held by exactly one rank, and each part knows its runs."""

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


@given(lengths=LENGTHS, parts=st.integers(1, 5), lanes=st.integers(1, 3))
@pytest.mark.parametrize("cut", [contiguous_split, zigzag_split])
def test_every_token_is_held_once_and_ranks_hold_evenly_many(
    cut: TokenSplit, lengths: list[int], parts: int, lanes: int
) -> None:
    whole, ranks = packing_of(lengths), parts * lanes
    dealt = [
        SequenceSharder(rank, ranks, tensor_ranks=lanes, token_split=cut)(whole)
        for rank in range(ranks)
    ]
    held = [packing.index[packing.local_tokens] for packing in dealt]
    assert torch.cat(held).sort().values.tolist() == whole.index.tolist()
    sizes = [len(index) for index in held]
    assert max(sizes) - min(sizes) <= (1 if lanes == 1 or cut is contiguous_split else 2)
    for part in range(parts):
        met = dealt[part * lanes].index[dealt[part * lanes].gathered_tokens]
        assert met.tolist() == torch.cat(held[part * lanes : (part + 1) * lanes]).tolist()


@given(lengths=LENGTHS, parts=st.integers(2, 4))
@pytest.mark.parametrize("cut", [contiguous_split, zigzag_split])
def test_runs_say_where_the_tokens_of_every_part_are(
    cut: TokenSplit, lengths: list[int], parts: int
) -> None:
    whole = packing_of(lengths)
    for rank in range(parts):
        packing = SequenceSharder(rank, parts, token_split=cut)(whole)
        assert packing.partition is not None
        said = [
            run.row * packing.length + run.position + step
            for run in packing.partition.spans[rank]
            for step in range(run.length)
        ]
        assert said == packing.index[packing.local_tokens].tolist()


def test_no_run_is_longer_than_what_one_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_parallel, "MAX_RUN_LENGTH", 3)
    division = SequenceSharder(1, 2)(packing_of([9, 4])).partition
    assert division is not None
    assert division.spans[1] == (
        TokenSpan(0, 7, 0, 2),
        TokenSpan(1, 0, 2, 3),
        TokenSpan(1, 3, 5, 1),
    )


def test_zigzag_gives_the_parts_of_a_long_row_the_same_number_of_pairs() -> None:
    def pairs(cut: TokenSplit, part: int) -> int:
        packing = SequenceSharder(part, 4, token_split=cut)(packing_of([64]))
        return int((packing.position[packing.local_tokens] + 1).sum())

    assert len({pairs(zigzag_split, part) for part in range(4)}) == 1
    assert pairs(contiguous_split, 3) > 6 * pairs(contiguous_split, 0)


@pytest.mark.parametrize("full", [True, False])
def test_padding_and_packing_keep_the_order_of_the_deal(full: bool) -> None:
    whole = packing_of([6, 6] if full else [6, 3])
    packing = SequenceSharder(0, 2, token_split=zigzag_split)(whole)
    x = torch.randn(whole.num_tokens, 3)
    assert torch.equal(packing.pack(packing.pad(x)), x)
    expected = torch.zeros(12, 3).index_copy(0, packing.index, x)
    assert torch.equal(packing.pad(x).flatten(0, 1), expected)


def test_one_rank_holds_everything_as_before() -> None:
    whole: Packing = packing_of([3, 1])
    assert SequenceSharder(0, 1)(whole) is whole
