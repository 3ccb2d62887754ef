"""Plan report: the best plans of a request with bytes, time, cost, and why others are slower."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, UserError
from moesaic.core.units import counted, show_seconds
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.streaming_rule import (
    StreamingRates,
    hidden_forward_tokens,
    tokens_per_expert,
)
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.pipeline_stages import PipelineStages
from moesaic.parallel.plan_problems import memory_problems, pipeline_problems
from moesaic.parallel.precision import BFloat16, Precision
from moesaic.parallel.state_blocks import check_state_blocks
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.planner.block_chain import BlockChain
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, TIER_WORDS, Purpose
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.machine import Machine, dtype_name
from moesaic.planner.plan_forecast import Limits, PlanForecast
from moesaic.planner.plan_model import (
    EXCHANGES,
    MORE_ROWS,
    PlanModel,
    PlanModelSettings,
)
from moesaic.planner.plan_space import (
    CompletePlan,
    Degrees,
    Option,
    PlanSpace,
    expert_numbers,
)
from moesaic.planner.search import Certificate, SearchResult, search
from moesaic.planner.state_bytes import ShardedState
from moesaic.planner.step_cost import CostSettings, step_cost
from moesaic.planner.tier_bytes import tier_names

RESERVE = 0.05  # of device memory: the context of the driver, libraries, fragmentation


class PlanRequest(Config):
    """What is planned: a model, its optimizer, and the space of plans."""

    name: str
    model: ModelConfig
    space: PlanSpace
    parallel: ParallelConfig = ParallelConfig()
    optimizer: Optimizer = AdamW()
    precision: Precision = BFloat16()
    trainable: TrainableParameters = AllParameters()

    @property
    def dtype(self) -> str:
        """The dtype of matrix products, as in a machine file."""
        return dtype_name(self.precision)

    @property
    def batch(self) -> BatchDims:
        """The rows of one step over all ranks."""
        return self.space.micro_batch(self.space.rows)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The best plans of a request, fastest first."""

    request: PlanRequest
    machine: Machine
    limits: Limits
    best: tuple[PlanForecast, ...]
    certificate: Certificate

    def rows(self, *, token_budget: float | None = None) -> list[dict[str, Any]]:
        """Return each plan as JSON data; the first is the fastest."""
        return [self._row(found, token_budget) for found in self.best]

    def tokens_per_second(self, found: PlanForecast) -> float:
        """Source and target tokens of all ranks per second."""
        return self.request.batch.tokens / found.time.total

    def mfu(self, found: PlanForecast) -> float:
        """FLOPs that active parameters need, over what the devices could do in the time."""
        flops = 3 * count_parameters(self.request.model).forward_flops(self.request.batch)
        peak = self.machine.products_of(self.request.dtype).peak.value
        return flops / found.time.total / (peak * self.request.space.ranks)

    def _row(self, found: PlanForecast, token_budget: float | None) -> dict[str, Any]:
        degrees, option, time = found.choice.degrees, found.choice.option, found.time
        row: dict[str, Any] = {
            "plan": {name: value for name, value in degrees._asdict().items() if name != "rows"},
            "micro_batch_rows": degrees.rows,
            "zero": option.zero,
            "memory": tier_names(option.memory),
            "checkpointing": type(option.checkpointing).__name__,
            "combination": found.choice.parallel_config(self.request.parallel).acronym,
            "bytes": _nested(found.held),
            "seconds": {
                "step": time.total,
                "compute": dict(time.compute),
                "communication": dict(time.communication),
                "transfers": dict(time.transfers),
                "update": time.update,
                "bubble": time.bubble,
                "hidden": time.hidden,
            },
            "tokens_per_second": self.tokens_per_second(found),
            "mfu_active": self.mfu(found),
            "streaming": streaming_tokens(
                self.request.model,
                degrees,
                sizes=self.request.space.micro_batch(degrees.rows),
                machine=self.machine,
                dtype=self.request.dtype,
            ),
        }
        if token_budget is not None:
            row["budget"] = self._budget(found, token_budget)
        if found is not self.best[0]:
            row["slower"] = why_slower(found, self.best[0])
        return row

    def _budget(self, found: PlanForecast, tokens: float) -> dict[str, float]:
        hours = tokens / self.tokens_per_second(found) / 3600
        cost = {"tokens": tokens, "hours": hours, "device_hours": hours * self.request.space.ranks}
        price = self.machine.price_per_device_hour
        return cost | ({"money": cost["device_hours"] * price.value} if price else {})


def streaming_tokens(
    model: ModelConfig, degrees: Degrees, *, sizes: BatchDims, machine: Machine, dtype: str
) -> dict[str, dict[str, float]]:
    """Return M and M* in forward of the parts of a model: ``tokens`` and ``needed``.

    M is how many tokens a weight multiplies in a micro-batch of ``sizes``: of dense layers all that
    a rank reads, of ``experts`` those of one. Of an encoder-decoder, the shorter side.
    """
    products, moe = machine.products_of(dtype), model.moe
    read = (
        sizes.rows * min(n or sizes.target for n in (sizes.source, sizes.target)) / degrees.context
    )
    parts = {"dense layers": (read, products.dense)}
    if isinstance(moe, MoE):
        chosen = moe.select.experts_per_token(moe.num_router_outputs)
        of_group = read / degrees.tensor * degrees.expert * degrees.expert_tensor
        m = tokens_per_expert(of_group, experts=moe.experts, experts_per_token=chosen)
        parts["experts"] = m, products.grouped
    found: dict[str, dict[str, float]] = {}
    for name, (tokens, rate) in parts.items():
        rates = StreamingRates(
            flops=max(flops for _, flops in rate.points),
            fetch=machine.host_to_device.bytes_per_s.value,
            write=machine.device_to_host.bytes_per_s.value,
        )
        needed = hidden_forward_tokens(rates, weight_bytes=2 if dtype == "bfloat16" else 4)
        found[name] = {"tokens": tokens, "needed": needed}
    return found


def streaming_words(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Return the sentence of ``streaming_tokens``."""
    each = [
        f"{name}: M* = {rule['needed']:,.0f}, here M = {rule['tokens']:,.0f}"
        for name, rule in parts.items()
    ]
    start = "a weight streams from the host for free if M* tokens of a micro-batch multiply it:"
    return "\n".join([start, *each])


def find_plans(
    request: PlanRequest,
    *,
    machine: Machine,
    limits: Limits,
    keep: int = 5,
) -> PlanReport:
    """Return the fastest plans that fit. Raises ConfigError if none does, naming the nearest."""
    inventory = inventory_of(request.model, trainable=request.trainable)
    model = plan_model(request, inventory=inventory, machine=machine)
    problems = training_problems(request)
    found = search(
        model,
        limits=limits,
        keep=keep,
        legal=_can_be_cut(request),
        trains=lambda choice: not any(problems(choice)),
    )
    if not found.best:
        raise ConfigError(_untrainable(request, found) or [nothing_fits(request, found)])
    return PlanReport(request, machine, limits, found.best, found.certificate)


def plan_model(
    request: PlanRequest, *, inventory: ParameterInventory, machine: Machine
) -> PlanModel:
    """Return the model that forecasts a request's plans, from steps measured on fake tensors."""
    settings = CostSettings(
        model=request.model,
        optimizer=request.optimizer,
        precision=request.precision,
        sizes=request.space.micro_batch(1),
        device=machine.device,
        trainable=request.trainable,
    )
    more_rows = settings.replace(sizes=request.space.micro_batch(MORE_ROWS))
    return PlanModel(
        PlanModelSettings(
            inventory=inventory,
            reference=step_cost(settings),
            more_rows=step_cost(more_rows).operations,
            exchanges=_measure_exchanges(request, settings),
            machine=machine,
            state=ShardedState(inventory, optimizer=request.optimizer, each=request.precision),
            precision=request.precision,
            base=request.parallel,
        ),
        request.space,
    )


def _measure_exchanges(
    request: PlanRequest, settings: CostSettings
) -> dict[str, tuple[CommunicationVolume, ...]]:
    """Return what one of two ranks sends for a row that it holds, by the axis of the two."""
    halves = (request.space.source % 2, request.space.target % 2) == (0, 0)
    found: dict[str, tuple[CommunicationVolume, ...]] = {}
    for axis in EXCHANGES if request.space.ranks > 1 else ():
        dense = axis in ("tensor", "context")
        plan = ParallelPlan().replace(**{axis: 2}, data=1 if dense else 2)
        if dense and not halves:
            continue
        parallel = request.parallel.replace(plan=plan)
        try:
            sent = step_cost(settings.replace(parallel=parallel, world=2)).sent
        except UserError:
            continue  # no plan has this axis
        share = 2 if dense else 1  # a row is on both ranks
        found[axis] = tuple(
            replace(line, bytes=share * line.bytes) for line in sent if line.kind != "all-reduce"
        )
    return found


def training_problems(request: PlanRequest) -> Callable[[CompletePlan], Iterator[str]]:
    """Return what yields why training refuses a plan, of layers that can be cut so."""
    base, trainable, experts = request.parallel, request.trainable, expert_numbers(request.model)

    @cache
    def stages(pipe: int) -> PipelineStages:
        return base.replace(plan=base.plan.replace(pipe=pipe)).pipeline_stages(request.model)

    def problems(choice: CompletePlan) -> Iterator[str]:
        plan, memory, m = choice.plan, choice.option.memory, choice.degrees.micro_batches
        yield from memory_problems(memory, plan=plan, expert_counts=experts)
        yield from trainable.parallel_problems(plan, memory=memory)
        if plan.pipe > 1:
            yield from pipeline_problems(stages(plan.pipe), micro_batches=m, zero=plan.zero)

    return problems


def _untrainable(request: PlanRequest, found: SearchResult) -> list[str]:
    """Return why no plan of the first degrees is trained, if that is why there is none."""
    degrees = next(iter(request.space.degrees(request.model)), None)
    if found.nearest is not None or degrees is None:
        return []
    plans = [CompletePlan(degrees, option) for option in request.space.options()]
    problems = training_problems(request)
    return list(dict.fromkeys(each for plan in plans for each in problems(plan)))


def _can_be_cut(request: PlanRequest) -> Callable[[Degrees], bool]:
    """Return a check of whether the model's layers and stages can be cut by some degrees."""
    option = Option(0, request.space.memory[0], request.space.checkpointing[0])
    chain = BlockChain.of(request.model, checkpointing=option.checkpointing)
    few = Transformer.without_values(request.model, layers=chain.run)  # a block of each kind

    @cache  # a split into stages is searched over all blocks, for few numbers of stages
    def can_be_staged(pipe: int) -> bool:
        parallel = request.parallel.replace(plan=request.parallel.plan.replace(pipe=pipe))
        try:
            parallel.pipeline_stages(request.model)
        except UserError:
            return False
        return True

    @cache
    def can_be_sharded(stage: Degrees) -> bool:
        plan = CompletePlan(stage, option).plan
        parallel = request.parallel.replace(plan=plan)
        try:
            check_parallel(few, parallel=parallel, plan=plan)
            check_state_blocks(
                few, optimizer=request.optimizer, trainable=request.trainable, plan=plan
            )
        except UserError:
            return False
        return True

    def legal(degrees: Degrees) -> bool:
        # micro-batches and stages do not change how layers are cut
        stage = degrees._replace(pipe=1, rows=1, micro_batches=1)
        return can_be_staged(degrees.pipe) and can_be_sharded(stage)

    return legal


def machine_limits(
    machine: Machine,
    *,
    ranks: int,
    memory: float | None = None,
    host: float | None = None,
    disk: float | None = None,
) -> Limits:
    """Return the bytes that one rank may hold in each tier: its device's, its share of its node's.

    ``memory`` replaces the machine's device memory, ``host`` and ``disk`` those of a node.
    """
    per_node = min(ranks, int(machine.devices_per_node.value))
    device = machine.device_memory.value if memory is None else memory
    node = machine.host_memory_per_node.value if host is None else host
    files = machine.disk_per_node.value if disk is None else disk
    return Limits({DEVICE: (1 - RESERVE) * device, HOST: node / per_node, DISK: files / per_node})


def nothing_fits(request: PlanRequest, found: SearchResult) -> str:
    """Return the sentence of a budget that no plan meets: the nearest plan and what it lacks."""
    ranks, plans = request.space.ranks, found.certificate.plans
    if found.nearest is None:
        batch = request.batch
        return (
            f"{request.name}: no plan of {ranks} ranks can be built for {batch.rows} rows of "
            f"{batch.source} + {batch.target} tokens: rows must divide over the data ranks, tokens "
            "over context x tensor, experts over expert ranks; choose another --batch or --gpus"
        )
    return (
        f"{request.name}: none of {plans:,} plans of {ranks} ranks fits. The nearest is "
        f"{plan_words(found.nearest.choice)}: {found.nearest}. Give it more --memory, --host or "
        "--gpus, or a smaller --batch"
    )


def plan_words(choice: CompletePlan) -> str:
    """Return a plan in words: its degrees above 1, ZeRO, tiers, checkpointing, micro-batch."""
    degrees, option = choice.degrees, choice.option
    words = [f"{n} {v}" for n, v in zip(degrees._fields[:6], degrees[:6], strict=True) if v > 1]
    words += [f"zero {option.zero}"] if option.zero else []
    words += [
        f"{name.replace('_', ' ')} on {TIER_WORDS[tier]}"
        for name, tier in tier_names(option.memory).items()
        if tier != DEVICE
    ]
    words += ["checkpointing"] if option.recomputes else []
    batches = counted(degrees.micro_batches, "micro-batch")
    return ", ".join([*words, f"{batches} of {counted(degrees.rows, 'row')}"])


def why_slower(found: PlanForecast, best: PlanForecast) -> str:
    """Return what costs a plan its time beside the best one: the largest difference."""
    mine, others = _parts(found), _parts(best)
    more = {name: mine.get(name, 0.0) - others.get(name, 0.0) for name in mine | others}
    name = max(more, key=lambda key: more[key])
    ratio = found.time.total / best.time.total - 1
    if more[name] <= 0:
        return "equally fast"
    return f"{ratio:.1%} slower: {show_seconds(more[name])} more of {name}"


def _parts(found: PlanForecast) -> dict[str, float]:
    time = found.time
    named = (time.compute, time.communication, time.transfers)
    parts = {name: seconds for part in named for name, seconds in part.items()}
    return parts | {"update": time.update, "bubble": time.bubble}


def _nested(held: Mapping[tuple[str, Purpose], int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (tier, purpose), size in held.items():
        found.setdefault(tier, {})[str(purpose)] = size
    return found
