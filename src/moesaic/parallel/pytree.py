"""Pytree: torch's hooks on a block look for tensors in what it reads and returns.

Ours reads a ``Stream`` and a ``Memory``. Without this FSDP2 would find no tensor in them, and not
gather a block's parameters again for its backward.
"""

from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree

from moesaic.model.block import BlockState
from moesaic.model.cache import EncoderOutput
from moesaic.ops.cross_entropy import TokenLoss


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
    return BlockState(x, replace(stream.carry, hidden=hidden, logits=logits), records)
