"""Stages: which blocks of a model each stage of a pipeline holds, and what else it needs.

The chain of blocks is the encoder's, then the decoder's. A stage is a run of it (``parallel/partial_forward.py``);
a rank with several stages holds one model without the blocks of other ranks, so names, and what the
weights start as, are those of the whole model. A parameter that several ranks need (a tied
embedding; what linked routers share) is held by each, and its gradient is the sum over them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_count import BatchDims, count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.parallel.partial_forward import BlockRange
from moesaic.parallel.pipeline_schedules import (
    Interleaved,
    OneForwardOneBackward,
    PipelineSchedule,
    can_split_backward,
)


class PipelineSplit(Choice):
    """Family: where the chain of blocks is cut into stages."""

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        """Return the number of the first block of every stage but the first."""
        raise NotImplementedError


class BalancedSplit(PipelineSplit):
    """The slowest stage is as quick as it can be, by FLOPs of rows of these lengths."""

    source: int = 32
    target: int = 32

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        sizes = BatchDims(source=self.source if config.encoder.layers else 0, target=self.target)
        return balanced_split(block_costs(config, sizes=sizes), parts=stages)


class SplitAt(PipelineSplit):
    """Stages after the first begin at these blocks, the encoder's counted first."""

    blocks: tuple[int, ...]

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        chain = config.encoder.layers + config.decoder.layers
        whole = (0, *self.blocks, chain)
        if len(self.blocks) != stages - 1 or any(a >= b for a, b in itertools.pairwise(whole)):
            raise ConfigError(
                [
                    f"cut.blocks={list(self.blocks)} must be {stages - 1} rising numbers between 1 "
                    f"and {chain - 1}: the first blocks of the {stages} stages but the first"
                ]
            )
        return self.blocks


@dataclass(frozen=True)
class PipelineStages:
    """The stages of a model on the ``ranks`` of a pipeline. Pure arithmetic."""

    config: ModelConfig
    schedule: PipelineSchedule
    ranks: int
    block_ranges: tuple[BlockRange, ...]

    @staticmethod
    def of(
        config: ModelConfig, *, schedule: PipelineSchedule, ranks: int, split: PipelineSplit
    ) -> "PipelineStages":
        """Cut a model. Raises ConfigError where it has fewer blocks than there are stages."""
        stages, chain = (
            ranks * schedule.stages_per_rank(),
            config.encoder.layers + config.decoder.layers,
        )
        if stages > chain:
            raise ConfigError(
                [
                    f"parallel.pipe={ranks} with {type(schedule).__name__} makes {stages} stages, "
                    f"but the model has {chain} blocks: choose fewer ranks, a schedule of fewer "
                    "stages, or a deeper model"
                ]
            )
        starts = (0, *split.split_points(config, stages=stages), chain)
        spans = itertools.pairwise(starts)
        legs = tuple(BlockRange.between(start, stop, config=config) for start, stop in spans)
        return PipelineStages(config, schedule, ranks, legs)

    @cached_property
    def rank_of_stage(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return self.schedule.rank_of_stage(self.ranks)

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank."""
        return tuple(stage for stage, place in enumerate(self.rank_of_stage) if place == rank)

    def remove_other_stages(self, model: Transformer, *, rank: int) -> None:
        """Take out of a whole model what the stages of other ranks alone need, in place."""
        needed = self._module_paths(rank)
        for path in sorted(module_paths(self.config, BlockRange.all_blocks(self.config)) - needed):
            above, _, name = path.rpartition(".")
            owner = model.get_submodule(above)
            if name in owner._parameters:
                owner.register_parameter(name, None)
            elif name in owner._modules:
                owner.add_module(name, ModuleOnOtherRank(path))

    @cached_property
    def ranks_of_parameter(self) -> dict[str, tuple[int, ...]]:
        """The ranks that hold each parameter, by its name in the whole model, in its order."""
        with torch.device("meta"):
            whole = Transformer(self.config)
        needed = [self._module_paths(rank) for rank in range(self.ranks)]
        cut = module_paths(self.config, BlockRange.all_blocks(self.config))
        return {
            name: tuple(
                rank
                for rank in range(self.ranks)
                if _is_under(name, needed[rank]) or not _is_under(name, cut)
            )
            for name, _ in whole.named_parameters()
        }

    @cached_property
    def shared_rank_sets(self) -> tuple[tuple[int, ...], ...]:
        """Every set of more than one rank that holds some parameter together, in a fixed order."""
        return tuple(
            sorted({ranks for ranks in self.ranks_of_parameter.values() if len(ranks) > 1})
        )

    def is_first_holder(self, name: str, *, rank: int) -> bool:
        """Whether a rank counts a parameter in sums over ranks (a norm): its first holder does."""
        return self.ranks_of_parameter[name][0] == rank

    def problems(self, *, micro_batches: int, zero: int) -> str | None:
        """Return why a step of so many micro-batches cannot run so, if it cannot.

        ``zero`` is the ZeRO stage that shares out what a stage holds.
        """
        schedule, name = self.schedule, type(self.schedule).__name__
        wanted = schedule.problems(ranks=self.ranks, micro_batches=micro_batches)
        if wanted:
            return f"{name} on {self.ranks} ranks expects {wanted}"
        if not schedule.splits_backward:
            return None
        instead = f"choose {Interleaved.__name__} or {OneForwardOneBackward.__name__}"
        if zero:
            return (
                f"{name} looks for the gradients of weights in the graph of a pass, and ZeRO stage "
                f"{zero} puts gathered ones in their place there, so that some are missed: "
                f"{instead}, or zero 0"
            )
        # the first stage makes all of its gradients at once
        for number, leg in enumerate(self.block_ranges[1:], 1):
            again = reused_parameters(self.config, leg)
            if again:
                return (
                    f"{name} makes gradients of weights apart, and cannot where a stage uses some "
                    f"in several places: stage {number} uses {again} so. Cut elsewhere, or "
                    f"{instead}"
                )
        if not can_split_backward():
            return (
                f"{name} makes gradients of weights apart, which PyTorch {torch.__version__} "
                f"cannot where operations are not its own: {instead}, or a newer PyTorch (2.13 can)"
            )
        return None

    def _module_paths(self, rank: int) -> frozenset[str]:
        return frozenset().union(
            *(module_paths(self.config, self.block_ranges[s]) for s in self.stages_of_rank(rank))
        )


class ModuleOnOtherRank(nn.Module):
    """In the place of a part that another rank holds."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *inputs: object, **named: object) -> None:
        """Raise: nothing here may ask for it."""
        del inputs, named
        raise RuntimeError(f"{self.path} is held by another rank of the pipeline")


def module_paths(config: ModelConfig, block_range: BlockRange) -> frozenset[str]:
    """Return the paths of the parts of a model that a leg needs."""
    found = {f"encoder.{i}" for i in block_range.encoder} | {
        f"decoder.{i}" for i in block_range.decoder
    }
    ends = block_range.decoder and block_range.decoder.stop == config.decoder.layers
    enters = reads = False
    sides = (
        ("encoder", config.encoder, block_range.encoder),
        ("decoder", config.decoder, block_range.decoder),
    )
    for side, stack, blocks in sides:
        if not blocks:
            continue
        moe = config.moe_of_stack(stack)
        enters = enters or blocks.start == 0
        linked = isinstance(moe, MoE) and bool(stack.moe_layers)
        reads = reads or (isinstance(moe, MoE) and moe.router_input.embedding_source() != "nothing")
        found |= {f"{side}_routing"} if linked else set()
        found |= {f"{side}_norm"} if blocks.stop == stack.layers else set()
    tied = config.embedding.tied
    found |= {"embedding" if tied else "embedding.output"} if ends else set()
    found |= {"embedding" if tied else "embedding.weight"} if enters or reads else set()
    return frozenset(found | (_position_paths(config) if enters else set()))


def reused_parameters(config: ModelConfig, block_range: BlockRange) -> str | None:
    """Return which parameters a leg uses in several places, one after the other, if any."""
    ends = bool(block_range.decoder) and block_range.decoder.stop == config.decoder.layers
    uses = int(ends and config.embedding.tied)
    sides = (
        ("encoder", config.encoder, block_range.encoder),
        ("decoder", config.decoder, block_range.decoder),
    )
    for side, stack, blocks in sides:
        uses += bool(blocks) and blocks.start == 0
        moe, routed = config.moe_of_stack(stack), sum(stack.is_moe_layer(layer) for layer in blocks)
        if not isinstance(moe, MoE):
            continue
        if moe.cross_layer.shared_every_layer and routed > 1:
            return f"what the routers of the {side} share"
        uses += routed if moe.router_input.embedding_source() != "nothing" else 0
    return "the embedding" if uses > 1 else None


def block_costs(config: ModelConfig, *, sizes: BatchDims) -> tuple[float, ...]:
    """Return the forward FLOPs of every block of the chain; the logits count for the last one."""
    encoder, decoder = config.encoder, config.decoder
    sides = (("encoder", encoder), ("decoder", decoder))
    costs = [
        _block_cost(config, side=side, layer=layer, sizes=sizes)
        for side, stack in sides
        for layer in range(stack.layers)
    ]
    costs[-1] += 2.0 * sizes.rows * sizes.target * config.dim * config.vocab_size
    return tuple(costs)


def balanced_split(costs: Sequence[float], *, parts: int) -> tuple[int, ...]:
    """Cut a list into runs so that the dearest is as cheap as can be; return where runs start.

    Among the best, the first has the earliest cuts.
    """
    total = [0.0, *itertools.accumulate(costs)]
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for part in range(1, parts + 1):
        for stop in range(part, len(costs) - (parts - part) + 1):
            options = (
                (max(best[part - 1, start][0], total[stop] - total[start]), start)
                for start in range(part - 1, stop)
                if (part - 1, start) in best
            )
            dearest, start = min(options)
            best[part, stop] = (dearest, (*best[part - 1, start][1], start))
    return best[parts, len(costs)][1][1:]


def _block_cost(config: ModelConfig, *, side: str, layer: int, sizes: BatchDims) -> float:
    """What one more block like this one adds to a model."""
    stack = config.encoder if side == "encoder" else config.decoder
    dense = Stack(layers=1, moe_every=0)
    other = dense if config.encoder.layers else config.encoder
    alike = Stack(layers=1, moe_every=1, moe=config.moe_of_layer(stack, layer=layer))
    one = config.replace(**{"encoder": other, "decoder": dense} | {side: alike})
    two = one.replace(**{side: alike.replace(layers=2)})
    return count_parameters(two).forward_flops(sizes) - count_parameters(one).forward_flops(sizes)


def _position_paths(config: ModelConfig) -> set[str]:
    """What adds positions to embeddings; what turns heads has no parts, and all blocks need it."""
    with torch.device("meta"):
        position = config.position.build(dim=config.dim, head_dim=config.head_dim)
    return {f"position.{name}" for name, _ in position.named_children()}


def _is_under(name: str, paths: frozenset[str]) -> bool:
    """Whether a parameter is in one of these parts."""
    words = name.split(".")
    return any(".".join(words[:length]) in paths for length in range(1, len(words) + 1))
