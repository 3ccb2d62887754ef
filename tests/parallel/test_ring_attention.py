"""Keys that come round one part at a time are found as if they were all here."""

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.nn.attention_backend import KeyValue
from moesaic.parallel import context_parallel
from moesaic.parallel.context_parallel import (
    SequenceSharder,
    TokenSplit,
    contiguous_split,
    zigzag_split,
)
from moesaic.parallel.ring_attention import AttentionTile, RingAttention
from parallel.attention_cases import CASES, Case, Outcome, look_as, look_here, packing_of

CUTS = {"in order": contiguous_split, "zigzag": zigzag_split}
TILED = {"tiled": Case((17, 3)), "tiled cross": Case((5, 9), source=(11, 2))}


def _everything(ranks: int) -> dict[str, Outcome]:
    rank, looking = distributed.get_rank(), RingAttention(distributed.group.WORLD)
    found = {
        f"{name}, {how}": look_as(case, looking=looking, rank=rank, ranks=ranks, cut=cut)
        for name, case in CASES.items()
        for how, cut in CUTS.items()
    }
    context_parallel.MAX_RUN_LENGTH = 3
    tiled = {n: look_as(c, looking=looking, rank=rank, ranks=ranks) for n, c in TILED.items()}
    return found | tiled


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_find_and_learn_what_one_would(ranks: int) -> None:
    seen = run_on_ranks(ranks, _everything, ranks)
    assert len(seen[0]) == 2 * len(CASES) + len(TILED)
    for name in seen[0]:
        case = (CASES | TILED)[name.removesuffix(", zigzag").removesuffix(", in order")]
        for whole, *parts in zip(look_here(case), *(s[name] for s in seen), strict=True):
            torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5, msg=name)


def _in_bfloat16() -> list[torch.Tensor]:
    looking, rank = RingAttention(distributed.group.WORLD), distributed.get_rank()
    with torch.autocast("cpu", torch.bfloat16):
        return look_as(CASES["causal"], looking=looking, rank=rank, ranks=2)


def test_sums_are_float32_under_autocast() -> None:
    seen = run_on_ranks(2, _in_bfloat16)
    for whole, *parts in zip(look_here(CASES["causal"]), *seen, strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def _pairs(cut: TokenSplit, rank: int) -> int:
    packing = SequenceSharder(rank, 4, token_split=cut)(packing_of([64]))
    assert packing.partition is not None
    runs = packing.partition.spans
    blocks = [
        AttentionTile.of(query, key, causal=True)
        for query in runs[rank]
        for part in runs
        for key in part
    ]
    return sum(_seen(block) for block in blocks if block is not None)


def _seen(block: AttentionTile) -> int:
    shape = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
    seen = torch.ones(shape, dtype=torch.bool)
    return int((seen if block.diagonal is None else seen.tril(block.diagonal)).sum())


def test_blocks_hold_each_causal_pair_once_and_zigzag_shares_them_evenly() -> None:
    pairs = 64 * 65 // 2
    assert sum(_pairs(contiguous_split, rank) for rank in range(4)) == pairs
    assert [_pairs(zigzag_split, rank) for rank in range(4)] == [pairs / 4] * 4


def test_keys_that_no_ring_has_read_are_refused() -> None:
    here = torch.zeros(1, 1, 1, 4)
    with pytest.raises(TypeError, match="needs a source from its own project_source"):
        RingAttention(None).cross_attention(
            here[0], packing=packing_of([1]), source=KeyValue(here, here), mask=None
        )
