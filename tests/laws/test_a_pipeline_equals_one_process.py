"""Law: a pipeline over several ranks gives the loss and every gradient of one process."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as distributed

from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks, run_on_ranks
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.auxiliary_losses import GlobalBatchBalance, RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import DecoupledRouting, PreGatedRouting, RecurrentRouting
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_gate import HiddenStateAndToken
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize, parallelize_on_mesh
from moesaic.parallel.pipeline import LossSettings, MicroBatch, Pipeline
from moesaic.parallel.pipeline_schedules import (
    BreadthFirst,
    DualPipeV,
    GPipe,
    Interleaved,
    InterleavedZeroBubble,
    OneForwardOneBackward,
    PipelineSchedule,
    ZeroBubbleV,
    can_split_backward,
)
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import (
    BALANCED_TOP1,
    LABELS,
    random_batch,
    tiny_model_config,
)
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import Objective
from moesaic.verify.synthetic_batches import shard_batch

OBJECTIVE = Objective(LossCategories(LABELS), precision=Float32())
BALANCES = (SwitchBalance(weight=0.3), RouterZLoss(weight=0.2))
RTS = BALANCED_TOP1.replace(
    balance=BALANCES, limit=Capacity(factor=0.7, minimum=0, priority=RandomPriority())
)
TOP2 = MoE(experts=4, select=TopK(k=2), balance=BALANCES)
SHARED = TOP2.replace(shared_experts=SharedExperts(number=1), hidden=16)
CPU = torch.device("cpu")


def _of(moe: MoE, *, layers: int = 2) -> ModelConfig:
    return tiny_model_config(moe=moe, layers=layers)


def _decoder(moe: MoE, *, layers: int = 4) -> ModelConfig:
    return _of(moe, layers=layers).replace(encoder=Stack(layers=0))


UNTIED = _of(TOP2.replace(router_input=HiddenStateAndToken())).replace(
    position=LearnedPositions(max_length=32), embedding=EmbeddingConfig(tied=False)
)
ALL = (
    GPipe(),
    OneForwardOneBackward(),
    Interleaved(),
    BreadthFirst(),
    InterleavedZeroBubble(),
    ZeroBubbleV(),
    DualPipeV(),
)
UNSPLIT_BACKWARD = (GPipe(), OneForwardOneBackward(), Interleaved(), BreadthFirst())
Case = tuple[ModelConfig, Sequence[PipelineSchedule], int]
ON_TWO: dict[str, Case] = {
    "top1-rts": (_of(RTS), ALL, 4),
    "decoder-shared-experts": (_decoder(SHARED), ALL, 8),
    "recurrent": (
        _of(TOP2.replace(cross_layer=RecurrentRouting(width=6))),
        UNSPLIT_BACKWARD[1:3],
        4,
    ),
    "pre-gated": (
        _of(TOP2.replace(cross_layer=PreGatedRouting())),
        (Interleaved(), ZeroBubbleV()),
        4,
    ),
    "decoupled": (
        _of(TOP2.replace(cross_layer=DecoupledRouting(dim=8, heads=2))),
        (Interleaved(),),
        4,
    ),
    "untied-learned-on-token": (UNTIED, UNSPLIT_BACKWARD[:3], 4),
    "balance-over-the-step": (
        _of(TOP2.replace(balance=(GlobalBatchBalance(weight=0.5),))),
        (OneForwardOneBackward(), BreadthFirst()),
        4,
    ),
}
ON_FOUR: dict[str, Case] = {
    "top1-rts": (_of(RTS), (OneForwardOneBackward(),), 4),
    "deeper": (_of(TOP2, layers=4), (Interleaved(), InterleavedZeroBubble(), ZeroBubbleV()), 8),
}


@dataclass(frozen=True)
class Outcome:
    """Loss terms, gradients and their norm."""

    terms: dict[str, float]
    grads: dict[str, Tensor]
    norm: float


def _batches(number: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
    """Micro-batches of uneven lengths."""
    whole = [random_batch(4, seed=seed, length=4 + 3 * seed % 7) for seed in range(number)]
    return [shard_batch(batch, rank=rank, world_size=world) for batch in whole]


def _built(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def _single_process(config: ModelConfig, *, micro_batches: int) -> Outcome:
    model = _built(config)
    parallel_model = parallelize(model, parallel=ParallelConfig(), world=SingleProcess())
    result = OBJECTIVE.forward_backward(parallel_model, batches=_batches(micro_batches))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    return Outcome({name: float(v) for name, v in result.sums.terms.items()}, grads, norm)


def _mesh(data: int) -> Mesh:
    plan = ParallelPlan(pipe=distributed.get_world_size() // data, data=data)
    return Mesh(plan, rank=distributed.get_rank(), device=CPU, expert_counts=(4,), timeout_s=10)


def _pipeline(config: ModelConfig, schedule: PipelineSchedule, *, mesh: Mesh) -> Pipeline:
    parallel = ParallelConfig(plan=mesh.plan, pipeline_schedule=schedule)
    pipeline = parallelize_on_mesh(_built(config), parallel=parallel, mesh=mesh).pipeline
    assert pipeline is not None
    return pipeline


def _sums(computed: Sequence[MicroBatch]) -> dict[str, float]:
    """Loss terms, summed over micro-batches and ranks."""
    sums: dict[str, float] = {}
    for micro_batch in computed:
        for name, value in micro_batch.terms.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return ProcessGroupWorld().all_reduce_floats(sums)


def _compare(case: Case, expected: Outcome, *, data: int = 1) -> None:
    config, schedules, micro_batches = case
    mesh = _mesh(data)
    rank, copies = mesh.coordinates()["data"], mesh.group("data")
    batches = _batches(micro_batches, rank=rank, world=data)
    predicted = sum(batch.num_predicted for batch in _batches(micro_batches))
    for schedule in (s for s in schedules if can_split_backward() or not s.splits_backward):
        pipe = _pipeline(config, schedule, mesh=mesh)
        assert pipe.stages.problems(micro_batches=micro_batches, zero=0) is None
        computed = pipe.forward_backward(batches, loss_settings=LossSettings(predicted))
        pipe.sum_shared_gradients(dtype=torch.float32)
        assert _sums(computed) == pytest.approx(expected.terms, abs=1e-5), schedule
        square = 0.0
        for name, parameter in pipe.model.named_parameters():
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if copies is not None:
                distributed.all_reduce(grad, group=copies)
            error = (grad - expected.grads.get(name, torch.zeros(()))).abs().max()
            assert float(error) <= 1e-5, (schedule, name)
            counts = pipe.stages.is_first_holder(name, rank=pipe.rank) and rank == 0
            square += float(grad.square().sum()) if counts else 0.0
        norm = math.sqrt(ProcessGroupWorld().all_reduce_floats({"square": square})["square"])
        assert norm == pytest.approx(expected.norm, rel=1e-5), schedule


def _failures(ranks: int, cases: Mapping[str, Case]) -> dict[str, str]:
    """Return what fails by case; the ranks are forked once."""
    expected = [_single_process(case[0], micro_batches=case[2]) for case in cases.values()]
    found = run_cases_on_ranks(
        ranks,
        lambda pair: _compare(*pair),
        list(zip(cases.values(), expected, strict=True)),
        collective_timeout_s=20,
    )
    ended = zip(cases, found, strict=True)
    return {name: str(each) for name, each in ended if isinstance(each, RankError)}


def test_two_ranks_give_what_one_gives() -> None:
    assert _failures(2, ON_TWO) == {}


def test_four_ranks_give_what_one_gives() -> None:
    assert _failures(4, ON_FOUR) == {}


def test_stages_of_two_ranks_that_share_the_data_give_what_one_process_gives() -> None:
    case = (_of(RTS), (OneForwardOneBackward(), ZeroBubbleV()), 4)
    expected = _single_process(case[0], micro_batches=4)

    def compare() -> None:
        _compare(case, expected, data=2)

    run_on_ranks(4, compare, collective_timeout_s=20)


def test_forward_only_computes_the_losses_of_any_number_of_batches() -> None:
    config, batches = _of(RTS), _batches(3)
    model = _built(config).eval()
    with torch.no_grad():
        expected = [model.loss(model(batch)).each for batch in batches]

    def compare() -> None:
        mesh = _mesh(1)
        for schedule in (OneForwardOneBackward(), Interleaved(), ZeroBubbleV()):
            pipe = _pipeline(config, schedule, mesh=mesh)
            pipe.model.eval()
            found = pipe.forward_only(batches, loss_settings=LossSettings(1))
            if pipe.stages.rank_of_stage[-1] == pipe.rank:
                torch.testing.assert_close([micro.loss.each for micro in found], expected)
            else:
                assert all(micro.loss is None for micro in found)

    run_on_ranks(2, compare, collective_timeout_s=20)
