"""Copies beside a device stay within a bound and follow each other; a ring frees its buffers."""

import pytest
import torch
from fake_device import FakeDevice

from moesaic.memory.device_copies import DeviceCopies, device_copies
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.pinned_ring import PinnedRing
from moesaic.memory.tensor_store import Access, Place


def test_a_cpu_has_no_copies() -> None:
    assert device_copies(torch.device("cpu"), max_bytes=1) is None


@pytest.mark.parametrize("seed", range(4))
def test_bytes_under_way_stay_within_their_bound(seed: int) -> None:
    device = FakeDevice(seed=seed)
    queue = DeviceCopies(device.streams, max_bytes=100).to_host
    for number in range(20):
        source = torch.full((1 + number % 4, 5), float(number))
        target = torch.empty_like(source)
        done = queue.start([(target, source)])
        if number % 3 == 0:
            done.synchronize()
            assert torch.equal(target, source)
    assert queue.peak_bytes <= 100
    queue.start([(torch.empty(64), torch.ones(64))])  # a larger one is alone
    assert queue.bytes == queue.peak_bytes == 256
    assert not device.problems


def test_a_copy_that_is_not_awaited_is_noticed() -> None:
    device = FakeDevice()
    queue = DeviceCopies(device.streams, max_bytes=100).to_host
    source = torch.ones(4)
    done = queue.start([(torch.empty(4), source)])
    source.zero_()
    done.synchronize()
    assert device.problems == ["a source changed before its copy was done"]


def test_pieces_arrive_in_order_through_few_buffers_and_a_failure_frees_them() -> None:
    device, found = FakeDevice(), list[torch.Tensor]()
    ring = PinnedRing(DeviceCopies(device.streams, max_bytes=1 << 10), num_bytes=1 << 10)
    tensors = [torch.randn(300, 3), torch.randn(7).bfloat16(), torch.randn(50)]

    def fail(arriving: object) -> None:
        raise OSError("no room")

    failed = ring.send(tensors, fail)
    with pytest.raises(OSError, match="no room"):
        failed.result()
    ring.send(tensors, lambda arriving: found.extend(p.clone() for p in arriving)).result()
    expected = ring.pieces(tensors)
    assert len(found) == len(expected) > 8
    assert all(map(torch.equal, found, expected))
    assert not device.problems


def test_copies_of_one_name_follow_each_other() -> None:
    device = FakeDevice()
    copies = NamedCopies(DeviceCopies(device.streams, max_bytes=1 << 10))
    host, first, second = torch.zeros(8), torch.ones(8), torch.full((8,), 2.0)
    copies.write("a", host, first)
    first.zero_()  # it may change at once
    back = copies.fetch([("a", host)], place=Place.DEVICE, access=Access.READ)
    copies.write("a", host, second)
    assert torch.equal(back.wait()[0], torch.ones(8))
    copies.synchronize(["a"])
    assert torch.equal(host, second)
    updated = copies.fetch([("w", second)], place=Place.HOST, access=Access.UPDATE)
    updated.wait()[0].add_(1)
    updated.release()
    copies.join()
    assert torch.equal(second, torch.full((8,), 3.0))
    assert not device.problems
