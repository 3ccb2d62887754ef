"""Block chain: the blocks of a model by kind, and the few of them whose cost stands for all.

Two blocks are of one kind if they have the same mixers, the same dense or sparse feed-forward and
the same activation checkpointing. A block's cost also depends on its neighbours (ZeRO gathers one
block while another computes), and the first block makes what a stack shares. So one block is run
for each kind between kinds of neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.model.config import ModelConfig
from moesaic.parallel.activation_checkpointing import ActivationCheckpointing

STACKS = ("encoder", "decoder")


@dataclass(frozen=True, slots=True)
class ChainPlace:
    """Where a span is: a block of a stack, or what comes before a stack's first (``block`` -1).

    The head is what comes before the stack ``"head"``.
    """

    stack: str
    block: int = -1


@dataclass(frozen=True, slots=True)
class BlockChain:
    """``representative[stack][i]`` is the block that is run for block i of a stack."""

    representative: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(config: ModelConfig, *, checkpointing: ActivationCheckpointing) -> "BlockChain":
        """Return the chain of a model."""
        found = {}
        for side in STACKS:
            kinds, first = _kinds(config, side=side, by=checkpointing), dict[object, int]()
            padded = ["", *kinds, ""]
            context = [tuple(padded[i : i + 3]) for i in range(len(kinds))]
            found[side] = tuple(first.setdefault(key, i) for i, key in enumerate(context))
        return BlockChain(found)

    @property
    def run(self) -> dict[str, tuple[int, ...]]:
        """The blocks of each stack that are run, in order."""
        return {side: tuple(sorted(set(r))) for side, r in self.representative.items()}

    def run_for(self, place: ChainPlace) -> ChainPlace:
        """Return the place whose spans are those of ``place``."""
        if place.block < 0:
            return place
        return ChainPlace(place.stack, self.representative[place.stack][place.block])

    def has_run(self, parameter: str) -> bool:
        """Whether the module of a parameter of this name was run: all outside of blocks are."""
        stack, _, rest = parameter.partition(".")
        number = rest.partition(".")[0]
        return not (stack in STACKS and number.isdigit()) or int(number) in self.run[stack]


def _kinds(config: ModelConfig, *, side: str, by: ActivationCheckpointing) -> list[str]:
    """Return a text for each block of a stack, equal where the blocks are."""
    stack = config.stack_of(side)
    kinds = []
    for layer in range(stack.layers):
        sparse = repr(config.moe_of_layer(stack, layer=layer))
        mixers = repr(config.mixers_of_layer(stack, layer=layer))
        feed_forward = stack.block_pattern(layer).feed_forward
        kinds.append(f"{mixers} {sparse} {feed_forward} {layer % by.period}")
    return kinds
