"""Law: every plan starts with the same weights, bit for bit, and no rank allocates more than its
shards, whether they are drawn or read from a file."""

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixer_cases import hybrid
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.checkpoint.snapshot import Shard
from moesaic.checkpoint.tensor_reader import TensorReader
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group
from moesaic.model.config import ModelConfig
from moesaic.model.presets.published_presets import trillion_384
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.nn import initializer
from moesaic.nn.initializer import NormalWeights, draw_seed
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.weight_start import draw_shards, weight_shards
from moesaic.train.warm_start import WeightsOfRun
from parallel.communication_cases import BIASED, BOTH, DECODER, parallel

PLANS: dict[str, tuple[ModelConfig, ParallelConfig, int]] = {
    "one process": (BOTH, parallel(), 1),
    "data": (BOTH, parallel(), 2),
    "ZeRO 1": (BIASED, parallel(zero=1), 2),
    "ZeRO 2, uneven": (BOTH, parallel(zero=2), 3),
    "ZeRO 3, more ranks than rows": (DECODER, parallel(zero=3), 10),
    "tensor": (BOTH, parallel(tensor=2), 2),
    "expert": (BIASED, parallel(expert=4), 4),
    "expert tensor": (DECODER, parallel(expert=2, expert_tensor=2, tensor=2), 4),
    "pipe": (BOTH, parallel(pipe=2), 2),
    "pipe, untied": (DECODER, parallel(pipe=3, expert=2), 6),
    "context": (BOTH, parallel(expert=4, context=2), 4),
    "all": (BOTH, parallel(expert=2, tensor=2, pipe=2, zero=2), 16),
    "mixers": (hybrid(BOTH), parallel(zero=3), 3),
    "low rank": (
        BOTH.replace(moe=MoE(experts=4, expert=LoRAExpert(rank=2), balance=(BiasUpdate(),))),
        parallel(expert=2, zero=1),
        4,
    ),
    "memory": (BOTH.replace(moe=ProductKeyMemory(keys_per_side=4, slots=16)), parallel(zero=3), 2),
    "shared router": (
        BOTH.replace(moe=MoE(experts=4, cross_layer=RecurrentRouting(width=4))),
        parallel(zero=3, expert=2),
        4,
    ),
}
Start = Callable[[ParallelModel], None]


class AllocationPeak(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive at once, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and storage.nbytes():
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def cut(config: ModelConfig, plan: ParallelConfig, *, rank: int) -> ParallelModel:
    """Return a rank's part of a model, with memory for its parameters."""
    model = Transformer.without_values(config)
    mesh = Mesh(
        plan.plan.resolve(torch.distributed.get_world_size()),
        rank=rank,
        device=torch.device("cpu"),
        expert_counts=expert_counts(model),
    )
    return parallelize_on_mesh(model, parallel=plan, mesh=mesh)


def whole_model(config: ModelConfig) -> tuple[Transformer, int]:
    torch.manual_seed(5)
    model = Transformer(config)
    torch.manual_seed(5)
    return model, draw_seed()


def started(name: str, start: Start) -> Iterator[tuple[dict[str, Shard], int]]:
    """Yield every rank's shards, and the peak of the bytes that it allocated beyond them."""
    config, plan, world = PLANS[name]
    for rank in range(world):
        with fake_process_group(world, rank=rank):
            with AllocationPeak() as counted:
                parallel_model = cut(config, plan, rank=rank)
                start(parallel_model)
            shards = weight_shards(parallel_model)
            parameters = parallel_model.shards()
            held = sum(b.data.nbytes for s in parameters.values() for b in s.blocks)
            assert not any(b.data.is_meta for s in shards.values() for b in s.blocks)
            yield shards, counted.peak - held


def differences(shards: dict[str, Shard], whole: dict[str, torch.Tensor]) -> list[str]:
    wrong = []
    for name, shard in shards.items():
        for block in shard.blocks:
            part = whole[name]
            for dim, (first, size) in enumerate(zip(block.offset, block.data.shape, strict=True)):
                part = part.narrow(dim, first, size)
            wrong += [] if torch.equal(part, block.data) else [name]
    return wrong


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_starts_with_the_same_weights_and_allocates_its_shards_only(name, monkeypatch):
    monkeypatch.setattr(initializer, "VALUES_AT_ONCE", 128)
    model, seed = whole_model(PLANS[name][0])
    whole, covered = export_weights(model), dict.fromkeys(export_weights(model), 0)
    for shards, beyond in started(name, lambda part: draw_shards(part, seed=seed)):
        assert differences(shards, whole) == []
        assert beyond <= 16 * 8 * 128  # a few tensors of float64 while values are drawn
        for tensor, shard in shards.items():
            covered[tensor] += sum(block.data.numel() for block in shard.blocks)
    assert all(covered[tensor] >= each.numel() for tensor, each in whole.items())


@pytest.mark.parametrize("name", ["ZeRO 3, more ranks than rows", "expert tensor", "pipe, untied"])
def test_a_rank_reads_the_bytes_of_its_shards_only(name, tmp_path, monkeypatch):
    """The slices that ranks read add up to the file where none of them holds a copy."""
    config, read = PLANS[name][0], []
    whole = export_weights(whole_model(config)[0])
    write_tensors(tmp_path / "model.safetensors", tensors=whole)
    (tmp_path / "config.yaml").write_text("{}")
    slice_of = TensorReader.read_slice

    def counting(self, stored, *, block, start, shape):
        read.append(torch.Size(shape).numel() * stored.dtype.itemsize)
        return slice_of(self, stored, block=block, start=start, shape=shape)

    monkeypatch.setattr(TensorReader, "read_slice", counting)
    weights = WeightsOfRun(path=str(tmp_path))
    for shards, beyond in started(name, lambda part: weights.fill(part, seed=0)):
        assert differences(shards, whole) == []
        assert sum(read) == sum(b.data.nbytes for s in shards.values() for b in s.blocks)
        mapped = sum(tensor.nbytes for tensor in whole.values())
        assert beyond <= mapped  # views of the file, which take no memory of their own
        read.clear()


def test_a_value_depends_on_its_place_in_the_whole_parameter_alone(monkeypatch):
    whole, shape = torch.empty(5, 6, 7), (5, 6, 7)
    initializer.draw_block(whole, NormalWeights(0.5), key=3, offset=(0, 0, 0), shape=shape)
    for size in (1, 10, 100):
        monkeypatch.setattr(initializer, "VALUES_AT_ONCE", size)
        part = torch.zeros(4, 6, 7)[:, 1:5, 2:]
        initializer.draw_block(part, NormalWeights(0.5), key=3, offset=(1, 2, 1), shape=shape)
        assert torch.equal(part, whole[1:5, 2:6, 1:6])


def test_another_name_or_seed_gives_other_values():
    keys = {initializer.parameter_key(seed, name) for seed in (1, 2) for name in ("up", "down")}
    assert len(keys) == 4


def test_a_buffer_without_values_is_refused_by_name():
    model = Transformer.without_values(BOTH)
    model.decoder_norm.register_buffer("scale", torch.empty(3, device="meta"))
    with pytest.raises(
        initializer.ConfigError, match=r"decoder_norm\.scale of RMSNormModule has no val"
    ):
        initializer.allocate_parameters(
            model, allocate=initializer.allocate_on(torch.device("cpu")), device=torch.device("cpu")
        )


def test_a_rank_of_1024_allocates_the_bytes_that_are_forecast_for_a_large_model():
    """Weights, gradients and AdamW's states, on a fake device; benchmarks/ has the whole model."""
    config, parallel_config = trillion_384().config, parallel(expert=128, tensor=8, zero=3)
    config = config.replace(decoder=config.decoder.replace(layers=3))
    with fake_process_group(1024, rank=777), SimulatedRank() as device, SharedChunks():
        model = cut(config, parallel_config, rank=777).model
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        buffers += 4 * (128 + 8)  # the ranks of both axes in their device meshes, int32
        held = [device.ledger.live_bytes - buffers]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        held.append(device.ledger.live_bytes - sum(held) - buffers)
        optimizer = AdamW().build(model.named_parameters(), kinds=model.parameter_kinds())
        optimizer.step()
        held.append(device.ledger.live_bytes - sum(held) - buffers)
    shards = ParameterInventory(config).on_rank(parallel_config, world=1024, rank=777).shards
    values = sum(torch.Size(shard.shape).numel() for shard in shards)
    assert held == [4 * values, 4 * values, 8 * values + 4 * len(shards)]
