"""Pipeline stages: the blocks of a model that each stage has, and the other modules it needs.

Blocks are numbered through the encoder, then the decoder; a stage has consecutive ones. A rank with
several stages holds one model without the modules of other ranks, so parameter names and initial
values are those of the whole model. A parameter that several ranks need (a tied embedding, a cell
that cross-layer routers share) is held by each, and its gradient is the sum over them.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims, count_parameters, head_parameters
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
    """Family: how blocks are split into pipeline stages."""

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        """Return the first block of every stage but the first."""
        raise NotImplementedError


class BalancedSplit(PipelineSplit):
    """Minimizes the FLOPs of the slowest stage, for rows of these lengths."""

    source: int = 32
    target: int = 32

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        sizes = BatchDims(source=self.source if config.encoder.layers else 0, target=self.target)
        return balanced_split(block_costs(config, sizes=sizes), parts=stages)


class SplitAt(PipelineSplit):
    """Splits before these blocks, numbered through the encoder, then the decoder."""

    blocks: tuple[int, ...]

    def split_points(self, config: ModelConfig, *, stages: int) -> tuple[int, ...]:
        layers = config.encoder.layers + config.decoder.layers
        bounds = (0, *self.blocks, layers)
        if len(self.blocks) == stages - 1 and all(a < b for a, b in itertools.pairwise(bounds)):
            return self.blocks
        raise ConfigError(
            [
                f"parallel.pipeline_split.blocks={list(self.blocks)} must be {stages - 1} rising "
                f"numbers between 1 and {layers - 1}: the first blocks of the {stages} stages but "
                "the first"
            ]
        )


@dataclass(frozen=True)
class PipelineStages:
    """The stages of a model on the ``ranks`` of a pipeline, and the blocks of each."""

    config: ModelConfig
    schedule: PipelineSchedule
    ranks: int
    block_ranges: tuple[BlockRange, ...]

    @staticmethod
    def of(
        config: ModelConfig, *, schedule: PipelineSchedule, ranks: int, split: PipelineSplit
    ) -> "PipelineStages":
        """Split a model. Raises ConfigError where it has fewer blocks than there are stages."""
        stages = ranks * schedule.stages_per_rank()
        layers = config.encoder.layers + config.decoder.layers
        if stages > layers:
            raise ConfigError(
                [
                    f"parallel.pipe={ranks} with {type(schedule).__name__} makes {stages} stages, "
                    f"but the model has {layers} blocks: choose fewer ranks, a schedule of fewer "
                    "stages, or a deeper model"
                ]
            )
        bounds = (0, *split.split_points(config, stages=stages), layers)
        ranges = tuple(
            BlockRange.between(start, stop, config=config)
            for start, stop in itertools.pairwise(bounds)
        )
        return PipelineStages(config, schedule, ranks, ranges)

    @cached_property
    def rank_of_stage(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return self.schedule.rank_of_stage(self.ranks)

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank."""
        return tuple(stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank)

    def ranges_of_rank(self, rank: int) -> list[BlockRange]:
        """Return the blocks of each stage of a rank."""
        return [self.block_ranges[stage] for stage in self.stages_of_rank(rank)]

    def remove_other_stages(self, model: Transformer, *, rank: int) -> None:
        """Remove the modules that only the stages of other ranks need, in place."""
        needed = self._module_paths(rank)
        for path in sorted(self._split_paths - needed):
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            if name in owner._parameters:
                owner.register_parameter(name, None)
            elif name in owner._modules:
                owner.add_module(name, ModuleOnOtherRank(path))

    def uses(self, stage: int, path: str) -> bool:
        """Whether a stage runs the module of this path, or a module in it."""
        paths = module_paths(self.config, self.block_ranges[stage])
        return _is_under(path, paths) or any(_is_under(each, frozenset([path])) for each in paths)

    @cached_property
    def ranks_of_parameter(self) -> dict[str, tuple[int, ...]]:
        """The ranks that hold each parameter, by name, in the whole model's order."""
        with torch.device("meta"):
            model = Transformer(self.config)
        return {name: self._ranks_under(name) for name, _ in model.named_parameters()}

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """Return the ranks that hold a parameter, of the model or of an adapter in it."""
        if name not in self._ranks_by_name:
            self._ranks_by_name[name] = self._ranks_under(name)
        return self._ranks_by_name[name]

    @cached_property
    def _ranks_by_name(self) -> dict[str, tuple[int, ...]]:
        return dict(self.ranks_of_parameter)  # and of adapters, once they are asked for

    def _ranks_under(self, name: str) -> tuple[int, ...]:
        everywhere = not _is_under(name, self._split_paths)
        paths = enumerate(self._paths_by_rank)
        return tuple(rank for rank, held in paths if everywhere or _is_under(name, held))

    @cached_property
    def _split_paths(self) -> frozenset[str]:
        return module_paths(self.config, BlockRange.all_blocks(self.config))

    @cached_property
    def _paths_by_rank(self) -> list[frozenset[str]]:
        return [self._module_paths(rank) for rank in range(self.ranks)]

    @cached_property
    def shared_rank_sets(self) -> tuple[tuple[int, ...], ...]:
        """Every set of several ranks that hold some parameter together, sorted."""
        return tuple(
            sorted({ranks for ranks in self.ranks_of_parameter.values() if len(ranks) > 1})
        )

    def is_first_holder(self, name: str, *, rank: int) -> bool:
        """Whether a rank is the first that holds a parameter: it counts it in sums (a norm)."""
        return self.ranks_of(name)[0] == rank

    def problems(self, *, micro_batches: int, zero: int) -> str | None:
        """Return why a step of ``micro_batches`` with ZeRO stage ``zero`` cannot run, or None."""
        schedule, name = self.schedule, type(self.schedule).__name__
        expected = schedule.problems(ranks=self.ranks, micro_batches=micro_batches)
        if expected:
            return f"{name} on {self.ranks} ranks expects {expected}"
        if not schedule.splits_backward:
            return None
        instead = f"choose {Interleaved.__name__} or {OneForwardOneBackward.__name__}"
        if zero:
            return (
                f"{name} computes gradients of weights apart, by the weights in a stage's autograd "
                f"graph, where ZeRO stage {zero} has gathered copies instead: {instead}, or zero 0"
            )
        # the first stage computes all of its gradients at once
        for number, blocks in enumerate(self.block_ranges[1:], 1):
            if reused := reused_parameters(self.config, blocks):
                return (
                    f"{name} computes gradients of weights apart, and cannot where a stage uses "
                    f"some in several places: stage {number} uses {reused} so. Split elsewhere, "
                    f"or {instead}"
                )
        if not can_split_backward():
            return (
                f"{name} computes gradients of weights apart, which PyTorch {torch.__version__} "
                f"cannot with custom autograd Functions: {instead}, or a newer PyTorch (2.13 can)"
            )
        return None

    def _module_paths(self, rank: int) -> frozenset[str]:
        return frozenset().union(
            *(module_paths(self.config, blocks) for blocks in self.ranges_of_rank(rank))
        )


class ModuleOnOtherRank(nn.Module):
    """Placeholder for a module that another rank of the pipeline holds; calling it raises."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *_: object, **__: object) -> None:
        raise RuntimeError(f"{self.path} is held by another rank of the pipeline")


def module_paths(config: ModelConfig, blocks: BlockRange) -> frozenset[str]:
    """Return the paths of the modules and parameters that a stage of these blocks needs."""
    paths = {f"encoder.{i}" for i in blocks.encoder} | {f"decoder.{i}" for i in blocks.decoder}
    last = _has_last_block(config, blocks)
    embeds = last and config.shares_table
    if last and config.has_output_table:
        paths.add("embedding.output")
    if last and config.head.parameter_specs(config.head_shape):
        paths.add("head")
    for side, stack, layers in _stacks(config, blocks):
        moe = config.moe_of_stack(stack)
        if isinstance(moe, MoE):
            embeds |= moe.router_input.embedding_source != "nothing"
            paths |= {f"{side}_routing"} if stack.moe_layers else set()
        if config.position.biases_scores:
            paths.add(f"{side}_score_bias")
        if layers.start == 0:
            embeds = True
            paths |= _position_paths(config)
        if layers.stop == stack.layers:
            paths.add(f"{side}_norm")
    if embeds:
        paths.add("embedding.weight" if config.has_output_table else "embedding")
    return frozenset(paths)


def reused_parameters(config: ModelConfig, blocks: BlockRange) -> str | None:
    """Return which parameters a stage of these blocks uses in several places, or None."""
    uses = int(_has_last_block(config, blocks) and config.shares_table)
    for side, stack, layers in _stacks(config, blocks):
        uses += layers.start == 0
        if config.position.biases_scores and len(layers) > 1:
            return f"the bias of the scores of the {side}"
        moe, moe_layers = config.moe_of_stack(stack), sum(map(stack.is_moe_layer, layers))
        if not isinstance(moe, MoE):
            continue
        if moe.cross_layer.shared_every_layer and moe_layers > 1:
            return f"what the routers of the {side} share"
        uses += moe_layers if moe.router_input.embedding_source != "nothing" else 0
    return "the embedding" if uses > 1 else None


def _stacks(config: ModelConfig, blocks: BlockRange) -> Iterator[tuple[str, Stack, range]]:
    """Yield name, config and layers of each stack that has some of these blocks."""
    if blocks.encoder:
        yield "encoder", config.encoder, blocks.encoder
    if blocks.decoder:
        yield "decoder", config.decoder, blocks.decoder


def _has_last_block(config: ModelConfig, blocks: BlockRange) -> bool:
    return bool(blocks.decoder) and blocks.decoder.stop == config.decoder.layers


def block_costs(config: ModelConfig, *, sizes: BatchDims) -> tuple[float, ...]:
    """Return the forward FLOPs of every block; the last one includes the logits."""
    costs = [
        _block_cost(config, side=side, layer=layer, sizes=sizes)
        for side, _, layers in _stacks(config, BlockRange.all_blocks(config))
        for layer in layers
    ]
    costs[-1] += 2.0 * sizes.rows * sizes.target * head_parameters(config)
    return tuple(costs)


def balanced_split(costs: Sequence[float], *, parts: int) -> tuple[int, ...]:
    """Split a list into parts that minimize the highest cost; return the starts of all but the
    first part. Of several such splits, the one with the earliest starts.
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
            highest, start = min(options)
            best[part, stop] = (highest, (*best[part - 1, start][1], start))
    return best[parts, len(costs)][1][1:]


def _block_cost(config: ModelConfig, *, side: str, layer: int, sizes: BatchDims) -> float:
    """Return the FLOPs that one more block like this one adds to a model."""
    stack = config.encoder if side == "encoder" else config.decoder
    dense = Stack(layers=1, moe_every=0)
    other = dense if config.encoder.layers else config.encoder
    moe, pattern = config.moe_of_layer(stack, layer=layer), str(stack.block_pattern(layer))
    same = Stack(layers=1, moe_every=1, moe=moe, pattern=pattern)
    one = config.replace(**{"encoder": other, "decoder": dense} | {side: same})
    two = one.replace(**{side: same.replace(layers=2)})
    return count_parameters(two).forward_flops(sizes) - count_parameters(one).forward_flops(sizes)


def _position_paths(config: ModelConfig) -> set[str]:
    """Return the modules that add positions to embeddings; rotary embeddings have none."""
    with torch.device("meta"):
        position = config.position.build(config.dim)
    return {f"position.{name}" for name, _ in position.named_children()}


def _is_under(name: str, paths: frozenset[str]) -> bool:
    """Whether a parameter is in one of the modules of these paths."""
    words = name.split(".")
    return any(".".join(words[:length]) in paths for length in range(1, len(words) + 1))
