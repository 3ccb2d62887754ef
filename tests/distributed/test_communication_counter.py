"""Counted bytes equal the closed forms, for our collectives and those of torch."""

from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.distributed._functional_collectives as functional
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.distributed.collectives import (
    all_gather_rows,
    all_to_all,
    reduce_from_group,
    reduce_scatter_rows,
)
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks

RANKS, D = 4, 6


def _ours() -> dict[str, list[int]]:
    group, rank = distributed.group.WORLD, distributed.get_rank()
    x = torch.randn(8, D, requires_grad=True)
    sizes = [1, 2, 0, 3]
    own = torch.randn(sizes[rank], D, requires_grad=True)
    found: dict[str, list[int]] = {}

    def count(name: str, make: Any) -> None:
        forward, backward = (
            CommunicationCounter(axes={"all": group}),
            CommunicationCounter(axes={"all": group}),
        )
        with forward:
            out = make()
        with backward:
            out.sum().backward()
        found[name] = [forward.total_bytes(axis="all"), backward.total_bytes()]
        assert forward.total_bytes() == forward.total_bytes(axis="all")

    even = [2] * RANKS
    count("all-to-all", lambda: all_to_all(x, group=group, input_splits=even, output_splits=even))
    count("gather", lambda: all_gather_rows(x, group=group, sizes=[8] * RANKS))
    count("uneven gather", lambda: all_gather_rows(own, group=group, sizes=sizes))
    count("scatter", lambda: reduce_scatter_rows(x, group=group, sizes=even))
    count("sum", lambda: reduce_from_group(x, group=group))
    return found


def test_our_collectives_send_the_bytes_of_their_closed_forms() -> None:
    row = D * 4
    for rank, found in enumerate(run_on_ranks(RANKS, _ours)):
        own = (1, 2, 0, 3)[rank]
        assert found["all-to-all"] == [6 * row, 6 * row]
        assert found["gather"] == [3 * 8 * row, 3 * 8 * row]
        assert found["uneven gather"] == [3 * own * row, (6 - own) * row]
        assert found["scatter"] == [6 * row, 6 * row]
        assert found["sum"] == [2 * 8 * row * 3 // 4, 0], "the backward of a sum sends nothing"


def _of_torch() -> dict[str, int]:
    group, rank = distributed.group.WORLD, distributed.get_rank()
    assert group is not None
    x, parts = torch.ones(8), [torch.ones(8) for _ in range(RANKS)]
    pair = distributed.new_subgroups(2)[0]
    calls = {
        "all-reduce": lambda: distributed.all_reduce(x),
        "broadcast": lambda: distributed.broadcast(x, src=1),
        "all-gather": lambda: distributed.all_gather(parts, x),
        "reduce-scatter": lambda: distributed.reduce_scatter(x, parts),
        "reduce": lambda: distributed.reduce(x, dst=1),
        "gather": lambda: distributed.gather(x, parts if rank == 0 else None, dst=0),
        "scatter": lambda: distributed.scatter(x, parts if rank == 2 else None, src=2),
        "message": lambda: (
            distributed.send(x, dst=3) if rank == 0 else distributed.recv(x) if rank == 3 else None
        ),
        "barrier": lambda: distributed.barrier(),
        "functional sum": lambda: functional.all_reduce(x, "sum", group) + 0,
        "functional gather": lambda: functional.all_gather_tensor(x, 0, group) + 0,
        "functional scatter": lambda: functional.reduce_scatter_tensor(x, "sum", 0, group) + 0,
        "functional exchange": lambda: functional.all_to_all_single(x, [2] * 4, [2] * 4, group) + 0,
        "pair": lambda: distributed.all_reduce(x, group=pair),
    }
    found = {}
    for name, call in calls.items():
        with CommunicationCounter() as wire:
            call()
        found[name] = wire.total_bytes()
        found[f"{name} to other nodes"] = wire.inter_node_bytes(ranks_per_node=2)
    return found


def test_collectives_of_torch_are_counted() -> None:
    every = run_on_ranks(RANKS, _of_torch)
    for rank, found in enumerate(every):
        assert found["all-reduce"] == found["functional sum"] == 48
        assert found["all-gather"] == found["functional gather"] == 96
        assert found["reduce-scatter"] == 96
        assert found["functional scatter"] == found["functional exchange"] == 24
        assert found["broadcast"] == (96 if rank == 1 else 0)
        assert found["reduce"] == (0 if rank == 1 else 32)
        assert found["gather"] == (0 if rank == 0 else 32)
        assert found["scatter"] == (96 if rank == 2 else 0)
        assert found["message"] == (32 if rank == 0 else 0)
        assert found["barrier"] == 0
        assert (found["pair"], found["pair to other nodes"]) == (32, 0)
        # on a ring over two nodes the last rank of each sends to the other node
        assert found["all-gather to other nodes"] == (96 if rank in (1, 3) else 0)
        assert found["functional exchange to other nodes"] == 16


def _sharded() -> tuple[int, int, int]:
    """A block over four ranks by FSDP2, forward and backward, each freed after its forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False))
    mesh = DeviceMesh("cpu", list(range(RANKS)), mesh_dim_names=("copies",))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    with CommunicationCounter(axes={"copies": mesh.get_group()}) as wire:
        model(torch.randn(4, 8)).sum().backward()
    parts = [
        wire.total_bytes(kind=kind, axis="copies") for kind in ("all-gather", "reduce-scatter")
    ]
    return parts[0], parts[1], wire.total_bytes()


def test_collectives_of_fsdp_are_counted() -> None:
    shared = 2 * 8 * 12 * 4 * 3 // 4  # what a rank sends to show or to sum all weights once
    for gathered, scattered, total in run_on_ranks(RANKS, _sharded):
        assert (gathered, scattered) == (2 * shared, shared)
        assert total == gathered + scattered


@pytest.fixture
def _thousand_ranks() -> Any:
    distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=1024)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_thousand_ranks")
def test_a_thousand_fake_ranks_are_counted_in_one_process() -> None:
    group = distributed.group.WORLD
    with FakeTensorMode(), CommunicationCounter() as wire:
        x = torch.randn(2048, 7168, dtype=torch.bfloat16, requires_grad=True)
        even = [2] * 1024
        out = all_to_all(x, group=group, input_splits=even, output_splits=even)
        all_gather_rows(out, group=group, sizes=[2048] * 1024).sum().backward()
    row = 7168 * 2
    assert wire.total_bytes(kind="all-gather") == 1023 * 2048 * row
    assert wire.total_bytes(kind="all-to-all") == 2 * 1023 * 2 * row + 1023 * 2048 * row
