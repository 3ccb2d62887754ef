"""Block chain: the blocks of a model by kind, and the few of them whose cost stands for all.

Two blocks are of one kind if they have the same mixers, the same dense or sparse feed-forward, the
same activation checkpointing, and the same parameters and adapters that are trained. A block's cost
also depends on its neighbours (ZeRO gathers one block while another computes), and the first block
makes what a stack shares. So one block is run for each kind between kinds of neighbours.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moesaic.model.config import ModelConfig
from moesaic.parallel.activation_checkpointing import ActivationCheckpointing
from moesaic.parallel.parameter_inventory import ParameterInfo

STACKS = ("encoder", "decoder")
AFTER_BLOCKS = ("decoder_norm", "head")


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
    def of(
        config: ModelConfig,
        *,
        checkpointing: ActivationCheckpointing,
        parameters: Sequence[ParameterInfo] = (),
    ) -> "BlockChain":
        """Return the chain of a model, whose ``parameters`` say what is trained; (): all."""
        trained = _trained(parameters)
        found = {}
        for side in STACKS:
            kinds, first = _kinds(config, trained, side=side, by=checkpointing), dict[object, int]()
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

    def names_without(self, reached: Collection[ChainPlace]) -> set[str]:
        """Return the names of the blocks whose spans are not at the places that were reached."""
        return {
            f"{stack}.{number}"
            for stack, blocks in self.representative.items()
            for number, run in enumerate(blocks)
            if ChainPlace(stack, run) not in reached
        }

    def has_run(self, parameter: str) -> bool:
        """Whether the module of a parameter of this name was run: all outside of blocks are."""
        stack, _, rest = parameter.partition(".")
        number = rest.partition(".")[0]
        return not (stack in STACKS and number.isdigit()) or int(number) in self.run[stack]


def _trained(parameters: Sequence[ParameterInfo]) -> Mapping[ChainPlace, str]:
    """Return a text for each block: its parameters, and whether its input needs a gradient."""
    inside: defaultdict[ChainPlace, list[ParameterInfo]] = defaultdict(list)
    needs_gradient = False
    for each in parameters:
        stack, _, rest = each.name.partition(".")
        number = rest.partition(".")[0]
        if stack in STACKS and number.isdigit():
            inside[ChainPlace(stack, int(number))].append(each)
        else:
            needs_gradient |= each.trained and stack not in AFTER_BLOCKS
    found = {}
    for place in sorted(inside, key=lambda each: (STACKS.index(each.stack), each.block)):
        names = [
            (each.name.split(".", 2)[2], each.placement.shape, each.trained)
            for each in inside[place]
        ]
        found[place] = f"{names} {needs_gradient}"
        needs_gradient |= any(each.trained for each in inside[place])
    return found


def _kinds(
    config: ModelConfig,
    trained: Mapping[ChainPlace, str],
    *,
    side: str,
    by: ActivationCheckpointing,
) -> list[str]:
    """Return a text for each block of a stack, equal where the blocks are."""
    stack = config.stack_of(side)
    kinds = []
    for layer in range(stack.layers):
        sparse = repr(config.moe_of_layer(stack, layer=layer))
        mixers = repr(config.mixers_of_layer(stack, layer=layer))
        feed_forward = stack.block_pattern(layer).feed_forward
        changed = trained.get(ChainPlace(side, layer), "")
        kinds.append(f"{mixers} {sparse} {feed_forward} {layer % by.period} {changed}")
    return kinds
