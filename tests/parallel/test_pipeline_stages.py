"""Pipeline stages have each block once, balanced cost, and the whole model's parameter names."""

import itertools

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_gate import HiddenStateAndTag
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.parallel.partial_forward import BlockRange, forward_blocks
from moesaic.parallel.pipeline_schedules import (
    DualPipeV,
    GPipe,
    Interleaved,
    InterleavedZeroBubble,
    OneForwardOneBackward,
    PipelineSchedule,
    ZeroBubbleV,
    can_split_backward,
)
from moesaic.parallel.pipeline_stages import (
    BalancedSplit,
    PipelineStages,
    SplitAt,
    balanced_split,
    block_costs,
)
from moesaic.testing.tiny_models import BALANCED_TOP1, random_batch, tiny_model_config

CONFIG = tiny_model_config(layers=4)
DECODER = CONFIG.replace(encoder=Stack(layers=0), decoder=Stack(layers=8))


def _stages(
    config: ModelConfig, *, ranks: int = 2, schedule: PipelineSchedule | None = None
) -> PipelineStages:
    return PipelineStages.of(
        config, schedule=schedule or Interleaved(), ranks=ranks, split=BalancedSplit()
    )


@pytest.mark.parametrize("config", [CONFIG, DECODER], ids=["encoder-decoder", "decoder"])
@pytest.mark.parametrize("schedule", [GPipe(), Interleaved(), ZeroBubbleV()], ids=repr)
def test_every_block_is_in_one_stage_and_order_is_kept(
    config: ModelConfig, schedule: PipelineSchedule
) -> None:
    ranges = _stages(config, schedule=schedule).block_ranges
    assert [i for blocks in ranges for i in blocks.encoder] == [*range(config.encoder.layers)]
    assert [i for blocks in ranges for i in blocks.decoder] == [*range(config.decoder.layers)]


def test_a_balanced_split_minimizes_the_highest_cost() -> None:
    draw = torch.Generator().manual_seed(0)
    for parts in (1, 2, 3, 4):
        costs = torch.rand(9, generator=draw).tolist()

        def highest(starts: tuple[int, ...], costs: list[float] = costs) -> float:
            spans = itertools.pairwise((0, *starts, len(costs)))
            return max(sum(costs[a:b]) for a, b in spans)

        splits = itertools.combinations(range(1, len(costs)), parts - 1)
        assert highest(balanced_split(costs, parts=parts)) == pytest.approx(
            min(map(highest, splits))
        )


def test_costs_of_blocks_add_up_to_the_model() -> None:
    config = tiny_model_config(layers=4).replace(
        encoder=Stack(layers=4), decoder=Stack(layers=3, moe_every=1, experts_per_layer=(2, 4, 8))
    )
    sizes = BatchDims(rows=2, source=20, target=30)
    assert sum(block_costs(config, sizes=sizes)) == pytest.approx(
        count_parameters(config).forward_flops(sizes)
    )


def test_logits_give_the_last_stage_fewer_blocks() -> None:
    wide = DECODER.replace(vocab_size=4096)
    assert len(_stages(wide).block_ranges[-1].decoder) < len(_stages(wide).block_ranges[0].decoder)


def test_a_split_by_hand_is_kept_and_an_impossible_one_refused() -> None:
    def split(*blocks: int) -> PipelineStages:
        return PipelineStages.of(CONFIG, schedule=GPipe(), ranks=2, split=SplitAt(blocks=blocks))

    assert split(6).block_ranges == (
        BlockRange(range(4), range(2)),
        BlockRange(range(4, 4), range(2, 4)),
    )
    for wrong in ((), (0,), (8,), (2, 3)):
        with pytest.raises(
            ConfigError, match=r"pipeline_split\.blocks=.* must be 1 rising numbers"
        ):
            split(*wrong)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="makes 16 stages, but the model has 8 blocks"):
        _stages(CONFIG, ranks=8)


VARIANTS = {
    "tied": CONFIG,
    "decoder": DECODER,
    "untied-learned": CONFIG.replace(
        embedding=EmbeddingConfig(tied=False), position=LearnedPositions(max_length=16)
    ),
    "recurrent": tiny_model_config(
        moe=MoE(experts=4, select=TopK(k=2), cross_layer=RecurrentRouting(width=6)), layers=4
    ),
    "on-tag": tiny_model_config(
        moe=BALANCED_TOP1.replace(router_input=HiddenStateAndTag()), layers=4
    ),
}


def _built(config: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return Transformer(config)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("schedule", [Interleaved(), ZeroBubbleV()], ids=repr)
def test_stages_have_the_names_and_weights_of_the_whole_model(
    name: str, schedule: PipelineSchedule
) -> None:
    config = VARIANTS[name]
    stages, whole = _stages(config, schedule=schedule), dict(_built(config).named_parameters())
    found: dict[str, list[int]] = {}
    for rank in range(2):
        model = _built(config)
        stages.remove_other_stages(model, rank=rank)
        for path, parameter in model.named_parameters():
            assert torch.equal(parameter, whole[path])
            found.setdefault(path, []).append(rank)
    assert {path: tuple(ranks) for path, ranks in found.items()} == stages.ranks_of_parameter
    assert set(found) == set(whole)


def test_a_block_and_an_untied_output_are_on_one_rank() -> None:
    stages = _stages(VARIANTS["untied-learned"], schedule=OneForwardOneBackward(), ranks=4)
    holders = stages.ranks_of_parameter
    shared = {name for name, ranks in holders.items() if len(ranks) > 1}
    assert shared == {"embedding.weight", "position.table.weight"}
    assert holders["embedding.output"] == (3,)


def test_a_tied_embedding_is_on_the_ranks_that_embed_and_compute_logits() -> None:
    stages = _stages(CONFIG, schedule=OneForwardOneBackward(), ranks=4)
    entry = next(rank for rank, blocks in enumerate(stages.block_ranges) if 0 in blocks.decoder)
    assert stages.ranks_of_parameter["embedding.weight"] == (0, entry, 3)
    assert stages.shared_rank_sets == ((0, entry, 3),)
    assert [stages.is_first_holder("embedding.weight", rank=r) for r in range(4)] == [1, 0, 0, 0]


def test_a_module_on_another_rank_raises_when_called() -> None:
    model = Transformer(CONFIG)
    _stages(CONFIG, schedule=GPipe()).remove_other_stages(model, rank=1)
    with pytest.raises(RuntimeError, match=r"encoder\.0 is held by another rank"):
        forward_blocks(model, random_batch(2, seed=0), blocks=BlockRange.all_blocks(CONFIG))


def test_split_backward_is_refused_where_torch_would_miss_gradients() -> None:
    splitting = _stages(CONFIG, schedule=InterleavedZeroBubble())
    why = splitting.problems(micro_batches=4, zero=0)
    assert (why is None) if can_split_backward() else ("or a newer PyTorch" in (why or ""))
    assert "ZeRO stage 3" in (splitting.problems(micro_batches=4, zero=3) or "")
    assert _stages(CONFIG).problems(micro_batches=4, zero=3) is None
    few = _stages(CONFIG, schedule=DualPipeV()).problems(micro_batches=3, zero=0)
    assert few == (
        "DualPipeV on 2 ranks expects at least as many micro-batches as stages, 4, not 3"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [("recurrent", "what the routers of the encoder share"), ("on-tag", "the embedding")],
)
def test_split_backward_is_refused_where_weights_are_reused(name: str, what: str) -> None:
    deep = VARIANTS[name].replace(encoder=Stack(layers=8, moe_every=1))
    why = _stages(deep, schedule=ZeroBubbleV(), ranks=2).problems(micro_batches=4, zero=0)
    assert what in (why or "")
    assert _stages(deep).problems(micro_batches=4, zero=0) is None


def test_a_decoder_in_one_stage_uses_a_tied_embedding_twice() -> None:
    shallow = CONFIG.replace(encoder=Stack(layers=7), decoder=Stack(layers=1))
    why = _stages(shallow, schedule=ZeroBubbleV()).problems(micro_batches=4, zero=0)
    assert "stage 3 uses the embedding" in (why or "")
    untied = shallow.replace(embedding=EmbeddingConfig(tied=False))
    why = _stages(untied, schedule=ZeroBubbleV()).problems(micro_batches=4, zero=0)
    assert "uses" not in (why or "")
