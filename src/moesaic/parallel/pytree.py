"""Pytree: torch's hooks on a block look for tensors in what it reads and returns.

Ours reads a ``Stream`` and a ``Memory``. Without this FSDP2 would find no tensor in them, and not
gather a block's parameters again for its backward.
"""

from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree

from moesaic.model.block import Stream
from moesaic.model.cache import Memory
from moesaic.ops.cross_entropy import TokenLoss


def show_streams() -> None:
    """Register both as trees of their tensors; once is enough."""
    if Stream not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            Stream, _flatten, _unflatten, serialized_type_name="moesaic.Stream"
        )
    if Memory not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            Memory,
            lambda memory: ([memory.states], memory.packing),
            lambda children, packing: Memory(*children, packing=packing),
            serialized_type_name="moesaic.Memory",
        )
    if TokenLoss not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            TokenLoss,
            lambda loss: ([loss.total], loss.nll),
            lambda children, nll: TokenLoss(*children, nll=nll),
            serialized_type_name="moesaic.TokenLoss",
        )


def _flatten(stream: Stream) -> tuple[list[Any], Any]:
    carry = stream.carry
    losses = [value for record in stream.records for value in record.losses.values()]
    return [stream.x, carry.hidden, carry.logits, *losses], stream


def _unflatten(children: Any, stream: Any) -> Stream:
    x, hidden, logits, *losses = children
    given = iter(losses)
    records = tuple(
        replace(record, losses={name: next(given) for name in record.losses})
        for record in stream.records
    )
    return Stream(x, replace(stream.carry, hidden=hidden, logits=logits), records)
