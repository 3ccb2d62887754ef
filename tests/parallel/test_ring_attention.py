"""Ring attention equals attention of one process, gradients included."""

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.attention_scores import AttentionMask, AttentionScores
from moesaic.parallel import context_parallel
from moesaic.parallel.context_parallel import (
    SequenceSharder,
    TokenSplit,
    contiguous_split,
    zigzag_split,
)
from moesaic.parallel.ring_attention import AttentionTile, RingAttention
from parallel.attention_cases import (
    CASES,
    Case,
    Outcome,
    attend_locally,
    attend_on_rank,
    packing_of,
)

SPLITS = {"in order": contiguous_split, "zigzag": zigzag_split}
TILED = {
    "tiled": Case((17, 3)),
    "tiled window": Case((17, 3), mask={"window": 5}, parts=("bias", "sinks")),
    "tiled chunks": Case((17, 3), causal=False, mask={"chunk": 4}),
    "tiled cross": Case((5, 9), source=(11, 2)),
}


def _all_cases(ranks: int) -> dict[str, Outcome]:
    rank, backend = distributed.get_rank(), RingAttention(distributed.group.WORLD)
    outcomes = {
        f"{name}, {how}": attend_on_rank(
            case, backend=backend, rank=rank, ranks=ranks, token_split=token_split
        )
        for name, case in CASES.items()
        for how, token_split in SPLITS.items()
    }
    context_parallel.MAX_RUN_LENGTH = 3
    tiled = {
        n: attend_on_rank(c, backend=backend, rank=rank, ranks=ranks) for n, c in TILED.items()
    }
    return outcomes | tiled


@pytest.mark.parametrize("ranks", [3, 4])  # two: the law of context-parallel ranks
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    results = run_on_ranks(ranks, _all_cases, ranks)
    assert len(results[0]) == 2 * len(CASES) + len(TILED)
    for name in results[0]:
        case = (CASES | TILED)[name.removesuffix(", zigzag").removesuffix(", in order")]
        for expected, *parts in zip(attend_locally(case), *(s[name] for s in results), strict=True):
            torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-5, msg=name)


def _in_bfloat16() -> list[torch.Tensor]:
    backend, rank = RingAttention(distributed.group.WORLD), distributed.get_rank()
    with torch.autocast("cpu", torch.bfloat16):
        return attend_on_rank(CASES["causal"], backend=backend, rank=rank, ranks=2)


def test_sums_are_float32_under_autocast() -> None:
    results = run_on_ranks(2, _in_bfloat16)
    for expected, *parts in zip(attend_locally(CASES["causal"]), *results, strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-5)


def _tiles(mask: AttentionMask, token_split: TokenSplit, rank: int) -> list[AttentionTile]:
    packing = SequenceSharder(rank, 4, token_split=token_split)(packing_of([64]))
    assert packing.partition is not None
    spans = packing.partition.spans
    found = [
        AttentionTile.of(query, key, mask=mask)
        for query in spans[rank]
        for part in spans
        for key in part
    ]
    return [tile for tile in found if tile is not None]


def _pairs(mask: AttentionMask, token_split: TokenSplit, rank: int) -> int:
    pairs = 0
    for tile in _tiles(mask, token_split, rank):
        visible = mask.visible(*tile.positions(torch.device("cpu")))
        assert visible.any(1).all()
        assert tile.masked == (not visible.all())
        pairs += int(visible.sum())
    return pairs


MASKS = {
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(causal=True, window=7),
    "window on both sides": AttentionMask(causal=False, window=7),
    "chunks": AttentionMask(causal=True, chunk=12),
}


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_cover_each_pair_once_and_each_query_sees_a_key_of_its_tile(mask: str) -> None:
    for split in SPLITS.values():
        pairs = sum(_pairs(MASKS[mask], split, rank) for rank in range(4))
        assert pairs == MASKS[mask].num_pairs(64)


def test_zigzag_balances_causal_pairs() -> None:
    pairs = [_pairs(MASKS["causal"], zigzag_split, rank) for rank in range(4)]
    assert pairs == [64 * 65 / 8] * 4


def test_a_window_skips_the_tiles_that_no_query_reaches() -> None:
    windowed, full = (
        len(_tiles(MASKS[mask], contiguous_split, rank=3)) for mask in ("window", "causal")
    )
    assert (windowed, full) == (2, 4)


def test_a_source_of_another_backend_is_refused() -> None:
    zeros = torch.zeros(1, 1, 1, 4)
    with pytest.raises(TypeError, match="needs a source from its own project_source"):
        RingAttention(None).cross_attention(
            zeros[0],
            packing=packing_of([1]),
            source=KeyValue(zeros, zeros),
            mask=None,
            scores=AttentionScores(AttentionMask(causal=False)),
        )
