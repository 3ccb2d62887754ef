"""A simulated rank computes what it would if every other rank did the same."""

import pytest
import torch
import torch.distributed as distributed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from moesaic.distributed.collectives import all_gather_rows, all_to_all
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group


def test_floats_are_fake_and_integers_are_real() -> None:
    with SimulatedRank():
        weights, places = torch.zeros(1 << 20, 1 << 20), torch.arange(6) % 4
        rows = weights[places]
    assert isinstance(rows, FakeTensor)
    assert rows.shape == (6, 1 << 20)
    assert not isinstance(places, FakeTensor)
    assert places.tolist() == [0, 1, 2, 3, 0, 1]


def test_reading_a_fake_value_is_refused() -> None:
    with SimulatedRank(), pytest.raises(DataDependentOutputException):
        float(torch.zeros(()) + 1)


def test_collectives_return_copies_of_what_this_rank_sends() -> None:
    with fake_process_group(1000, rank=3), SimulatedRank():
        group = distributed.group.WORLD
        counts = torch.arange(2000).view(1000, 2)
        each = [1] * 1000
        came = all_to_all(counts, group=group, input_splits=each, output_splits=each)
        assert came.tolist() == [[6, 7]] * 1000
        gathered = all_gather_rows(torch.tensor([[5]]), group=group, sizes=each)
        assert gathered.flatten().tolist() == [5] * 1000
        total = torch.tensor([2])
        distributed.all_reduce(total)
        assert total.item() == 2000
    assert not distributed.is_initialized()


def test_live_bytes_are_those_of_live_tensors() -> None:
    with SimulatedRank() as simulated:
        one = torch.zeros(100)
        view = one[10:]
        assert simulated.ledger.live_bytes == 400
        other = view + 1
        assert simulated.ledger.live_bytes == 400 + 360
        del one, other
        assert simulated.ledger.live_bytes == 400, "a view keeps all of its storage"


def test_shared_chunks_equal_those_of_torch() -> None:
    for length, chunks in ((12, 4), (7, 3), (2, 5), (0, 2)):
        whole = torch.arange(length * 2).view(length, 2)
        wanted = torch.chunk(whole, chunks)
        with SharedChunks():
            found = torch.chunk(whole, chunks)
        assert len(found) == chunks
        assert [len(piece) for piece in found[: len(wanted)]] == [len(p) for p in wanted]
        assert all(len(piece) == 0 for piece in found[len(wanted) :])
        assert torch.equal(found[0], wanted[0])
