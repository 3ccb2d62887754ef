"""Law: counted work (operations, bytes, messages, files) is what its formula says.

A row has a count, a function of one size, and its formula in the same unit, constants included.
Both are compared at a size and at twice that size. Nothing here measures seconds.
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as distributed
from plan_cases import small_model, small_space

from cost_counters import (
    CostLaw,
    CountingStore,
    OperationCounter,
    count_flops,
    open_files,
    peak_bytes,
)
from moesaic.corpus.append_files import OPEN_FILES
from moesaic.corpus.pair import Pair
from moesaic.corpus.spill import PairSpill
from moesaic.corpus.split import _RareTrigramIndex
from moesaic.distributed import watchdog as watchdog_module
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.compare_ranks import require_same_on_all_ranks
from moesaic.distributed.heartbeat import DEFAULT_GROUP, HeartbeatFile
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.simulation import fake_process_group
from moesaic.distributed.watchdog import Watchdog
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.transformer import Transformer
from moesaic.moe.edge_queues import QueuedEdges, keep_first_over_ranks
from moesaic.moe.expert_capacity import Capacity
from moesaic.nn import recurrence_backend
from moesaic.nn.packing import Packing, TokenPartition, TokenSpan
from moesaic.nn.recurrence_backend import ContextRecurrence, ConvolutionWeights
from moesaic.ops.chunk_sizes import CPU_CHUNKS, use_chunk_sizes
from moesaic.ops.cross_entropy import cross_entropy
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.matrix_owners import MatrixOwners
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.planner import step_cost
from moesaic.planner.machine import find_machine
from moesaic.planner.measured_step import MeasuredPart
from moesaic.planner.plan_report import PlanRequest, plan_model
from moesaic.testing.tiny_models import tiny_model_config
from step_costs import (
    OPEN_AT_ONCE,
    VALUES_AT_ONCE,
    WEIGHTS,
    files_hashed,
    files_read_at_once,
    read_bytes,
    start_bytes,
    step_laws,
)
from text_costs import texts_laws

SLACK = 0.1


def _stalled_ranks(ranks: int) -> CountingStore:
    """All ranks post a heartbeat and find that they make no progress; rank 1 is missing."""
    store = CountingStore()
    files = [HeartbeatFile() for _ in range(ranks)]
    watchdogs = [
        Watchdog(store, rank=rank, size=ranks, timeout_s=1e-6, heartbeat_file=file)
        for rank, file in enumerate(files)
    ]
    for rank, watchdog in enumerate(watchdogs):
        if rank != 1:
            files[rank].begin_collective("all_reduce", group=DEFAULT_GROUP)
        watchdog._post_heartbeat()
    clock = patch.object(watchdog_module.time, "time", return_value=2e9)
    printing = patch.object(watchdog_module, "_print_stderr")
    with clock, printing as printed, patch.object(Watchdog, "_wait_for_exit", return_value=True):
        for watchdog in watchdogs:
            watchdog._warn_if_stalled()
            watchdog._store.close()
    assert "rank 1 did not reach all_reduce" in printed.call_args_list[0].args[0]
    return store


def _members_posted(ranks: int) -> CountingStore:
    """Two heartbeats of each rank, in a group of all of them."""
    store, group = CountingStore(), distributed.group.WORLD
    with patch.object(distributed, "get_process_group_ranks", return_value=list(range(ranks))):
        for rank in range(ranks):
            file = HeartbeatFile()
            file.begin_collective("all_reduce", group="stage")
            watchdog = Watchdog(store, rank=rank, size=ranks, timeout_s=1, heartbeat_file=file)
            watchdog.add_group("stage", group=group)
            for _ in range(2):
                watchdog._post_heartbeat()
            watchdog._store.close()
    return store


def _compared_bytes(ranks: int) -> int:
    """A rank of so many compares its config with the others'."""
    with fake_process_group(ranks), CommunicationCounter() as counter:
        world = ProcessGroupWorld()
        with patch.object(ProcessGroupWorld, "any_rank", lambda *_: False):
            require_same_on_all_ranks({"lr": 0.1}, world=world, what="config")
    return counter.total_bytes()


def _groups_made(ranks: int) -> int:
    """A rank of so many makes the process groups of its plan."""
    plan = ParallelPlan(data=ranks // 4, tensor=2, pipe=2, expert=2)
    made = patch.object(distributed, "new_group", wraps=distributed.new_group)
    with fake_process_group(ranks), made as calls:
        Mesh(plan, rank=0, device=torch.device("cpu"), expert_counts=(4,))
    return calls.call_count


def _loss_of(tokens: int, words: int) -> Callable[[], None]:
    """The loss of so many tokens over so many words, 32 channels, 2**12 bytes of logits."""
    hidden, table = (torch.randn(size, 32, requires_grad=True) for size in (tokens, words))
    label = torch.randint(words, (tokens,))

    def loss_and_gradients() -> None:
        cross_entropy(hidden, weight=table, label=label).total.backward()

    return loss_and_gradients


def _table_passes(tokens: int, words: int) -> int:
    """How often the gradient of the table is read and written."""
    with use_chunk_sizes(replace(CPU_CHUNKS, logits=1 << 12)), OperationCounter() as counter:
        _loss_of(tokens, words)()
    return counter.names["addmm_"]


def _loss_bytes(words: int) -> int:
    """The bytes that a loss holds at once."""
    with use_chunk_sizes(replace(CPU_CHUNKS, logits=1 << 12)):
        return peak_bytes(_loss_of(64, words))


def _capacity(ranks: int, *, edges: int = 64) -> CommunicationCounter:
    """A rank of so many with so many edges decides which are over the capacity of 8 experts."""
    keys = torch.arange(edges)[:, None] << 56  # the first digits differ
    expert = torch.arange(edges) % 8
    queues = QueuedEdges(expert, keys, (64,), row=expert, num_experts=8, num_limited=8)
    capacity = partial(Capacity().expert_capacity, num_experts=8, factor=0.5)
    with fake_process_group(ranks), CommunicationCounter() as counter:
        keep_first_over_ranks(queues, capacity=capacity, world=ProcessGroupWorld())
    return counter


def _exchange_plans(layers: int) -> int:
    """So many layers with a recurrence, over two context ranks that share a row of four tokens."""
    spans = ((TokenSpan(0, 0, 0, 2),), (TokenSpan(0, 2, 0, 2),))
    partition = TokenPartition((2, 2), spans=spans)
    packing = replace(Packing.from_lengths(torch.tensor([4]), length=4), partition=partition)
    weights = ConvolutionWeights(3, width=2)
    planned = patch.object(
        recurrence_backend._ExchangePlan, "of", wraps=recurrence_backend._ExchangePlan.of
    )
    with fake_process_group(2), planned as plans:
        for _ in range(layers):
            backend = ContextRecurrence(distributed.group.WORLD)
            backend.convolve(torch.ones(2, 3), packing=packing, weights=weights, earlier=None)
    return plans.call_count


class _MuonStep(NamedTuple):
    flops: int
    peak_bytes: int
    sent_bytes: int


@cache
def _muon_step(ranks: int, zero: int) -> _MuonStep:
    """A rank of so many updates the matrices of a model: replicated, or sharded by ZeRO."""
    with fake_process_group(ranks):
        model = Transformer(tiny_model_config())
        parallel = ParallelConfig(plan=ParallelPlan(zero=zero))
        parallel_model = parallelize(model, parallel=parallel, world=ProcessGroupWorld())
        matrices = (named for named in model.named_parameters() if named[1].ndim > 1)
        optimizer = Muon().build(matrices, kinds=model.parameter_kinds())
        optimizer.matrix_sharding = MatrixOwners(parallel_model)
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if "muon" in g["name"]]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # the first one makes states and plans
        with CommunicationCounter() as sent:
            flops = count_flops(optimizer.step)
        return _MuonStep(flops, peak_bytes(optimizer.step), sent.total_bytes())


CAPACITY_DIGITS = 1  # of the keys of these edges that are compared
MATRIX_BYTES, MUON_FLOPS = 61440, 4055040  # of the tiny model: all matrices, one rank


def _texts_compared(texts: int) -> int:
    """Every held-out text has a near-duplicate in train, 3-grams of its own, and those of all."""
    draw = random.Random(0)
    words = [[chr(draw.randrange(0x4E00, 0x9000)) for _ in range(12)] for _ in range(texts)]
    held_out = {"".join(word) + "in all" for word in words}
    index = _RareTrigramIndex(held_out, 0.6)
    for text in sorted(held_out):
        index.find_near(text + "a")
    assert index.found == held_out
    return index.compared


def _files_of_directions(directions: int) -> int:
    before = open_files()
    with tempfile.TemporaryDirectory() as folder:
        spill = PairSpill(Path(folder) / "spill")
        for number in range(directions):
            spill.add(Pair("a", "b", "eng_Latn", f"x{number}"), rank=0, allowed_split="any")
        found = open_files() - before
        spill.close()
    return found


def _blocks_measured(ranks: int) -> int:
    """The steps on fake tensors before plans for so many ranks are forecast by arithmetic."""
    model = small_model()
    request = PlanRequest(name="small", model=model, space=small_space(ranks))
    counted = patch.object(MeasuredPart, "measure", autospec=True, side_effect=MeasuredPart.measure)
    step_cost._measure_once.cache_clear()
    with counted as calls:
        machine = find_machine("h100")
        plan_model(request, inventory=ParameterInventory(model), machine=machine)
    return calls.call_count


LAWS: dict[str, CostLaw] = {
    # two of a rank alone, with few and more rows, and one on two ranks of each of four axes
    "steps measured to plan for n ranks": CostLaw(_blocks_measured, lambda _: 6, size=512),
    "passes over the table's gradient in a loss of n tokens": CostLaw(
        lambda n: _table_passes(n, 64), lambda n: n / 16, size=64
    ),
    "passes over the table's gradient in a loss over n words": CostLaw(
        lambda n: _table_passes(64, n), lambda n: n / 16, size=64
    ),
    # gradients of table and states, twice in backward; logits, their slice and its powers
    "bytes of a loss over n words": CostLaw(
        _loss_bytes, lambda n: 2 * 4 * 32 * (n + 64) + 2 * (1 << 12), size=256
    ),
    "messages of the watchdogs of n ranks, one of them lost": CostLaw(
        lambda n: _stalled_ranks(n).messages, lambda n: 2 * n + 7, size=8
    ),
    # heartbeats, a look for the group, and its members once
    "messages of the watchdogs of n ranks in a group of theirs": CostLaw(
        lambda n: _members_posted(n).messages, lambda n: 3 * n + 1, size=8
    ),
    "bytes of the watchdogs of n ranks in a group of theirs": CostLaw(
        lambda n: _members_posted(n).bytes, lambda n: 2 * 300 * n, size=128
    ),
    "bytes of the watchdogs of n ranks, one of them lost": CostLaw(
        lambda n: _stalled_ranks(n).bytes, lambda n: 3 * 480 * (n + 1), size=8
    ),
    "bytes that a rank of n sends to compare its config": CostLaw(
        _compared_bytes, lambda n: 2 * 32 * 8 * (n - 1) / n, size=8
    ),
    "FLOPs of Muon on a rank of n with copies": CostLaw(
        lambda n: _muon_step(n, zero=0).flops, lambda n: MUON_FLOPS / n, size=2
    ),
    "FLOPs of Muon on a rank of n with ZeRO": CostLaw(
        lambda n: _muon_step(n, zero=3).flops, lambda n: MUON_FLOPS / n, size=2
    ),
    "bytes held by Muon on a rank of n with copies": CostLaw(
        lambda n: _muon_step(n, zero=0).peak_bytes,
        lambda n: MATRIX_BYTES * (1 + 1.8 / n),  # its update, and the products for its own
        size=2,
    ),
    "bytes held by Muon on a rank of n with ZeRO": CostLaw(
        lambda n: _muon_step(n, zero=3).peak_bytes, lambda n: MATRIX_BYTES * 2.8 / n, size=2
    ),
    "bytes sent by Muon on a rank of n with copies": CostLaw(
        lambda n: _muon_step(n, zero=0).sent_bytes, lambda n: MATRIX_BYTES * (n - 1) / n, size=2
    ),
    "bytes that a rank of n sends to limit capacity": CostLaw(
        lambda n: _capacity(n).total_bytes(),
        lambda n: 2 * (1 + CAPACITY_DIGITS * 256) * 9 * 8 * (n - 1) / n,
        size=8,
    ),
    "bytes that a rank sends to limit capacity of n edges": CostLaw(
        lambda n: _capacity(8, edges=n).total_bytes(),
        lambda _: 2 * (1 + CAPACITY_DIGITS * 256) * 9 * 8 * 7 / 8,
        size=64,
    ),
    # lengths of the queues, a digit, and those that are equal to the end
    "messages of a rank of n to limit capacity": CostLaw(
        lambda n: _capacity(n).calls().total(), lambda _: 2 + CAPACITY_DIGITS, size=8
    ),
    "comparisons of a search for near-duplicates of n texts": CostLaw(
        _texts_compared, lambda n: n, size=100
    ),
    "files that are open while n directions are read": CostLaw(
        _files_of_directions, lambda _: OPEN_FILES, size=80
    ),
    "plans of the exchange of a recurrence in n layers": CostLaw(
        _exchange_plans, lambda _: 1, size=2
    ),
    "process groups that a rank of n makes": CostLaw(_groups_made, lambda _: 6, size=16),
    "bytes that a rank of n holds while it draws its weights": CostLaw(
        start_bytes, lambda n: WEIGHTS / n + 6 * 8 * VALUES_AT_ONCE, size=2
    ),
    "bytes that a rank of n reads of a checkpoint": CostLaw(
        read_bytes, lambda n: WEIGHTS / n, size=2
    ),
    "bytes that a rank of n reads of a checkpoint of two ranks": CostLaw(
        partial(read_bytes, written_by=2), lambda n: WEIGHTS / n, size=4
    ),
    "files that are open while a checkpoint of n ranks is read": CostLaw(
        files_read_at_once, lambda _: OPEN_AT_ONCE, size=4
    ),
    **texts_laws(),
    "files that n ranks hash before they read a checkpoint": CostLaw(
        files_hashed, lambda _: 2, size=2
    ),
    **step_laws(),
}


@pytest.mark.parametrize("name", LAWS)
def test_costs_grow_as_their_formulas_say(name: str) -> None:
    law = LAWS[name]
    for size in (law.size, 2 * law.size):
        counted, formula = law.count(size), law.formula(size)
        assert counted <= (1 + SLACK) * formula, f"{name}: at {size}"
        assert counted >= formula / 2, f"{name}: the formula is loose at {size}"


SIZES = ("ranks", "texts", "languages", "experts", "micro-batches", "words")
QUANTITIES = ("operations", "bytes sent", "bytes held", "messages", "files")


def test_every_size_has_a_law_of_every_quantity() -> None:
    names = [name.replace("_", "-") for name in LAWS]
    missing = [
        (quantity, size)
        for quantity in QUANTITIES
        for size in SIZES
        if not any(name.startswith(quantity) and f"n {size}" in name for name in names)
    ]
    assert missing == []
