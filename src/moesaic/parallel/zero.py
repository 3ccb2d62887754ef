"""ZeRO: the ranks that hold copies of a parameter share it out (1910.02054), by torch's FSDP2.

Stage 1 shares out the optimizer's state, stage 2 its gradients too, stage 3 the parameters
themselves. FSDP2 keeps parameters sharded between steps in every stage; what differs is what stays
whole during one: in stage 3 a block's parameters are gathered for its forward and again for its
backward, in 1 and 2 once; in stage 1 gradients stay whole until the step's last micro-batch.

Pytree: torch's hooks on a block look for tensors in what it reads and returns.

Ours reads a ``Stream`` and a ``EncoderOutput``. Without this FSDP2 would find no tensor in them, and not
gather a block's parameters again for its backward.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DimShard

from moesaic.distributed.mesh import DATA_CONTEXT_AXES, Mesh
from moesaic.model.block import BlockState
from moesaic.model.kv_cache import EncoderOutput
from moesaic.model.transformer import Transformer
from moesaic.nn.embedding import Embedding
from moesaic.ops.cross_entropy import TokenLoss
from moesaic.parallel.sharding_plan import GradientSync, ShardingPlan, expert_modules, zero_dim


def register_pytree_nodes() -> None:
    """Register both as trees of their tensors; once is enough."""
    if BlockState not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            BlockState, _flatten_stream, _unflatten_stream, serialized_type_name="moesaic.Stream"
        )
    if EncoderOutput not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderOutput,
            lambda memory: ([memory.states], memory.packing),
            lambda children, packing: EncoderOutput(*children, packing=packing),
            serialized_type_name="moesaic.Memory",
        )
    if TokenLoss not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            TokenLoss,
            lambda loss: ([loss.total], loss.nll),
            lambda children, nll: TokenLoss(*children, nll=nll),
            serialized_type_name="moesaic.TokenLoss",
        )


def _flatten_stream(stream: BlockState) -> tuple[list[Any], Any]:
    carry = stream.router_state
    losses = [value for record in stream.records for value in record.losses.values()]
    return [stream.x, carry.hidden, carry.logits, *losses], stream


def _unflatten_stream(children: Any, stream: Any) -> BlockState:
    x, hidden, logits, *losses = children
    given = iter(losses)
    records = tuple(
        replace(record, losses={name: next(given) for name in record.losses})
        for record in stream.records
    )
    return BlockState(x, replace(stream.router_state, hidden=hidden, logits=logits), records)


def apply_zero(
    model: Transformer,
    *,
    mesh: Mesh,
    gradient_sync: Mapping[str, GradientSync],
    sharding_plan: ShardingPlan,
) -> dict[str, GradientSync]:
    """Shard experts over their copies and everything else over data and context. Collective."""
    register_pytree_nodes()
    # a router's loss is a view of a sum; nothing of ours changes what a block returns in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    found = dict(gradient_sync)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expert: set[nn.Parameter] = set()
    for _, bank, layer in expert_modules(model):
        number = layer.router.config.experts
        own = [p for p in bank.parameters() if sharding_plan[names[p]].sharded_dims]
        expert |= set(own)
        if mesh.size("expert_data", num_experts=number) > 1:
            shared = [p for p in bank.parameters() if not sharding_plan[names[p]].sharded_dims]
            _fully_shard(bank, mesh=mesh, axes=("expert_data",), experts=number, ignored=shared)
            for method in ("forward_edges", "in_one_call"):
                register_fsdp_forward_method(bank, method)
    if mesh.size(*DATA_CONTEXT_AXES) > 1:
        for module in _fsdp_units(model, pipe=mesh.plan.pipe):
            _fully_shard(module, mesh=mesh, axes=DATA_CONTEXT_AXES, experts=None, ignored=expert)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            axes = (
                ("expert_data",)
                if sharding_plan[name].sharded_dims and sharding_plan[name].experts
                else DATA_CONTEXT_AXES
            )
            found[name] = _synced_by_zero(found[name], *axes)
    return found


def _fsdp_units(model: Transformer, *, pipe: int) -> Iterator[nn.Module]:
    """Yield what is gathered at a time, inner ones first.

    A stage of a pipeline is never called as a whole: each part stands by itself then, and what is
    left (norms) stays whole.
    """
    for module in (*model.encoder, *model.decoder, *([model.embedding] if pipe > 1 else [])):
        if next(module.parameters(), None) is not None:
            yield module
    if pipe == 1:
        yield model
        return
    for method in ("embed_replicated", "loss", "logits"):
        register_fsdp_forward_method(model.embedding, method)


def set_gradient_accumulation(model: nn.Module, *, last: bool, zero_stage: int) -> None:
    """Say whether the next backward is the step's last: only then do stage 1's gradients meet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or zero_stage > 1, recurse=False)
            module.set_is_last_backward(last)


def _fully_shard(
    module: nn.Module,
    *,
    mesh: Mesh,
    axes: tuple[str, ...],
    experts: int | None,
    ignored: Iterable[nn.Parameter],
) -> None:
    device_mesh = mesh.device_mesh(*axes, num_experts=experts)
    # what scores after the last block must find its table whole
    stays = isinstance(module, Transformer | Embedding)
    ranks = device_mesh.size()

    def along(parameter: nn.Parameter) -> DimShard:
        return DimShard(zero_dim(tuple(parameter.shape), ranks=ranks))

    sharded = fully_shard(
        module,
        mesh=device_mesh,
        reshard_after_forward=mesh.plan.zero == 3 and not stays,
        shard_placement_fn=along,
        offload_policy=_offload_policy(mesh),
        ignored_params=set(ignored),
    )
    # a loss is a share (moe/batch_group.py): gradients are summed, and nothing is divided
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _offload_policy(mesh: Mesh) -> OffloadPolicy:
    if not mesh.plan.offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")


def _synced_by_zero(sharing: GradientSync, *axes: str) -> GradientSync:
    """Move axes from those that are summed later to those that ZeRO sums."""
    rest = tuple(axis for axis in sharing.all_reduce_axes if axis not in axes)
    return replace(sharing, all_reduce_axes=rest, zero_axes=axes)
