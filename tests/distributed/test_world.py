"""The collectives, on one process and on several."""

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed import world as world_module
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World


def _everything() -> dict[str, object]:
    world = ProcessGroupWorld()
    weight = torch.nn.Parameter(torch.zeros(3))
    unused = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.full((3,), float(world.rank + 1))
    unused.grad = torch.ones(2, 2) if world.rank == 0 else None
    world.all_reduce_gradients([weight, unused])
    value = torch.tensor([float(world.rank)])
    world.broadcast([value])
    mine = torch.tensor([world.rank])
    return {
        "sum": world.all_reduce(torch.tensor([1, world.rank])).tolist(),
        "floats": world.all_reduce_floats({"a": 0.5, "b": float(world.rank)}),
        "grads": [weight.grad.tolist(), unused.grad.tolist()],
        "any": (world.any_rank(world.rank == 1), world.any_rank(False)),
        "broadcast": value.tolist(),
        "share": world.broadcast_object({"path": f"of rank {world.rank}"}),
        "gather": [part.tolist() for part in world.all_gather(mine)],
        "mine": mine.tolist(),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_receives_the_same_sums(size: int) -> None:
    total = size * (size - 1) // 2
    for rank, got in enumerate(run_on_ranks(size, _everything)):
        assert got["sum"] == [size, total]
        assert got["floats"] == {"a": 0.5 * size, "b": total}
        assert got["grads"] == [[size * (size + 1) / 2] * 3, [[1.0, 1.0], [1.0, 1.0]]]
        assert got["any"] == (True, False)
        assert got["broadcast"] == [0.0]
        assert got["share"] == {"path": "of rank 0"}
        assert got["gather"] == [[r] for r in range(size)]
        assert got["mine"] == [rank], "sum and gather must not change what they were given"


def test_a_single_process_has_the_same_methods_and_changes_nothing() -> None:
    world = SingleProcess()
    assert isinstance(world, World)
    weight = torch.nn.Parameter(torch.zeros(2))
    world.all_reduce_gradients([weight])
    assert weight.grad is None
    assert world.all_reduce(torch.tensor([2.0])).tolist() == [2.0]
    assert world.all_reduce_floats({"a": 1.0}) == {"a": 1.0}
    assert world.any_rank(True)
    assert world.broadcast_object([1]) == [1]
    assert world.all_gather(torch.tensor([3]))[0].tolist() == [3]


def _count_reductions() -> tuple[int, list[float]]:
    calls = []
    inner = distributed.all_reduce

    def counted(tensor: torch.Tensor, *, group: distributed.ProcessGroup | None) -> None:
        calls.append(tensor.numel())
        inner(tensor, group=group)

    world_module.distributed.all_reduce = counted
    parameters = [torch.nn.Parameter(torch.zeros(100)) for _ in range(50)]
    for parameter in parameters:
        parameter.grad = torch.ones(100)
    ProcessGroupWorld().all_reduce_gradients(parameters)
    return len(calls), [float(p.grad.sum()) for p in parameters]


def test_gradients_are_reduced_in_few_flat_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "BUCKET_BYTES", 4 * 100 * 20)
    for calls, sums in run_on_ranks(2, _count_reductions):
        assert calls == 3  # 50 parameters, 20 to a bucket
        assert sums == [200.0] * 50
