"""ZeRO: the ranks with copies of a parameter shard it between them (1910.02054), by torch's FSDP2.

Stage 1 shards optimizer state, stage 2 also gradients, stage 3 also parameters. FSDP2 keeps
parameters sharded between steps in every stage; stages differ in what stays unsharded within a
step: stage 3 gathers a block's parameters for its forward and again for its backward, stages 1 and
2 gather them once in a step; stage 1 keeps gradients unsharded until the step's last micro-batch.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from moesaic.distributed.mesh import DATA_CONTEXT_AXES, Mesh
from moesaic.distributed.world import is_dtensor
from moesaic.model.block import BlockState
from moesaic.model.kv_cache import EncoderOutput
from moesaic.model.transformer import Transformer
from moesaic.nn.embedding import Embedding
from moesaic.ops.cross_entropy import TokenLoss
from moesaic.parallel.precision import Precision
from moesaic.parallel.sharding_plan import GradientSync, ShardingPlan, expert_modules, zero_dim


def register_pytree_nodes() -> None:
    """Register the inputs and outputs of blocks as pytrees of their tensors.

    FSDP2's hooks look for tensors in them, to gather a block's parameters again for its backward.
    """
    if BlockState not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            BlockState, _flatten_state, _unflatten_state, serialized_type_name="moesaic.BlockState"
        )
    if EncoderOutput not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderOutput,
            lambda memory: ([memory.states], memory.packing),
            lambda children, packing: EncoderOutput(*children, packing=packing),
            serialized_type_name="moesaic.EncoderOutput",
        )
    if TokenLoss not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            TokenLoss,
            lambda loss: ([loss.total], loss.nll),
            lambda children, nll: TokenLoss(*children, nll=nll),
            serialized_type_name="moesaic.TokenLoss",
        )


def _flatten_state(state: BlockState) -> tuple[list[Any], Any]:
    router = state.router_state
    losses = [value for record in state.records for value in record.losses.values()]
    return [state.x, router.hidden, router.logits, *losses], state


def _unflatten_state(children: Any, state: Any) -> BlockState:
    x, hidden, logits, *losses = children
    remaining = iter(losses)
    records = tuple(
        replace(record, losses={name: next(remaining) for name in record.losses})
        for record in state.records
    )
    return BlockState(x, replace(state.router_state, hidden=hidden, logits=logits), records)


def apply_zero(
    model: Transformer,
    *,
    mesh: Mesh,
    precision: Precision,
    gradient_sync: Mapping[str, GradientSync],
    sharding_plan: ShardingPlan,
) -> dict[str, GradientSync]:
    """Shard experts over ``expert_data``, all else over data and context. Collective.

    Returns the gradient synchronization of every parameter with ZeRO's axes moved.
    """
    register_pytree_nodes()
    names = {parameter: name for name, parameter in model.named_parameters()}
    sharded_experts: set[nn.Parameter] = set()
    for _, experts, layer in expert_modules(model):
        number = layer.router.config.experts
        own = {p for p in experts.parameters() if sharding_plan[names[p]].sharded_dims}
        sharded_experts |= own
        if mesh.size("expert_data", num_experts=number) > 1:
            shared = set(experts.parameters()) - own
            _fully_shard(
                experts,
                mesh=mesh,
                axes=("expert_data",),
                precision=precision,
                ignored=shared,
                num_experts=number,
            )
            for method in ("forward_edges", "in_one_call"):
                _fsdp().register_fsdp_forward_method(experts, method)
    if mesh.size(*DATA_CONTEXT_AXES) > 1:
        for module in _fsdp_units(model, pipe=mesh.plan.pipe):
            _fully_shard(
                module,
                mesh=mesh,
                axes=DATA_CONTEXT_AXES,
                precision=precision,
                ignored=sharded_experts,
            )
    sync = dict(gradient_sync)
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            zero_axes = sharding_plan[name].zero_axes
            rest = tuple(axis for axis in sync[name].all_reduce_axes if axis not in zero_axes)
            sync[name] = GradientSync(rest, zero_axes)
    return sync


def _fsdp_units(model: Transformer, *, pipe: int) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are gathered together, inner ones first.

    In a pipeline the model itself is never called: the embedding is then a unit of its own, and
    other parameters outside of blocks (norms) stay replicated.
    """
    for module in (*model.encoder, *model.decoder, *([model.embedding] if pipe > 1 else [])):
        if next(module.parameters(), None) is not None:
            yield module
    if pipe == 1:
        yield model
        return
    if isinstance(model.embedding, Embedding):
        for method in ("embed_replicated", "loss", "logits"):
            _fsdp().register_fsdp_forward_method(model.embedding, method)


def set_gradient_accumulation(modules: Iterable[nn.Module], *, last: bool, zero_stage: int) -> None:
    """Set whether the next backward through these modules is the step's last.

    Stage 1 reduces gradients only then, and stages 1 and 2 release gathered parameters only then.
    """
    sharded: Any = filter(_is_sharded, modules)
    for module in sharded:
        module.set_requires_gradient_sync(last or zero_stage > 1, recurse=False)
        module.set_reshard_after_backward(last or zero_stage == 3, recurse=False)


def _fsdp() -> Any:
    """Return FSDP2. Importing it takes half a second, and only plans with ZeRO need it."""
    return importlib.import_module("torch.distributed.fsdp")


def _is_sharded(module: nn.Module) -> bool:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # imported where modules are sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def gather_again(module: nn.Module) -> None:
    """Have the next forward pass of a module gather its weights, also where it has them still."""
    if _is_sharded(module):
        sharded: Any = module
        sharded.reshard()


class _ViewWarningFilter:
    """Ignores FSDP2's warning about outputs that are views, within the calls of one module.

    A router's loss is a view of a sum; no code here changes a block's output in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._contexts: list[Any] = []
        module.register_forward_pre_hook(self._enter, prepend=True)
        module.register_forward_hook(self._exit, always_call=True)

    def _enter(self, *_: Any) -> None:
        context = warnings.catch_warnings()
        context.__enter__()
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        self._contexts.append(context)

    def _exit(self, *_: Any) -> None:
        self._contexts.pop().__exit__(None, None, None)


def _fully_shard(
    module: nn.Module,
    *,
    mesh: Mesh,
    axes: tuple[str, ...],
    precision: Precision,
    ignored: set[nn.Parameter],
    num_experts: int | None = None,
) -> None:
    device_mesh = mesh.device_mesh(*axes, num_experts=num_experts)
    # the loss reads the embedding after the last block
    keep_gathered = isinstance(module, Transformer | Embedding)
    ranks = device_mesh.size()

    def shard_dim(parameter: nn.Parameter) -> Any:
        return placements.Shard(zero_dim(tuple(parameter.shape), ranks=ranks))

    fsdp, placements = _fsdp(), importlib.import_module("torch.distributed.tensor")
    sharded = fsdp.fully_shard(
        module,
        mesh=device_mesh,
        reshard_after_forward=mesh.plan.zero == 3 and not keep_gathered,
        shard_placement_fn=shard_dim,
        mp_policy=fsdp.MixedPrecisionPolicy(
            param_dtype=precision.parameter_dtype,
            reduce_dtype=precision.reduce_dtype,
            cast_forward_inputs=False,
        ),
        ignored_params=ignored,
    )
    # a rank's loss is its share (moe/batch_group.py): gradients are summed, never averaged
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    _ViewWarningFilter(module)  # after FSDP2's own hooks: it has to enclose them
