"""Plan problems: the memory tiers and micro-batches that training refuses under a plan."""

from collections.abc import Iterator, Sequence

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.parallel.pipeline_stages import PipelineStages


def memory_problems(
    memory: MemoryPlan, *, plan: ParallelPlan, expert_counts: Sequence[int]
) -> Iterator[str]:
    """Yield a sentence for each tier that a plan leaves nothing to, or cannot use.

    ``expert_counts`` are the different numbers of experts of the model's layers.
    """
    if plan.pipe > 1 and memory.run_ahead_bytes:
        yield (
            f"parallel.memory.run_ahead_bytes={memory.run_ahead_bytes} with parallel.plan.pipe="
            f"{plan.pipe}: the gradients of a stage are complete at the end of a step, so no "
            "update runs ahead: set run_ahead_bytes to 0, or pipe to 1"
        )
    if memory.late_steps and not expert_counts:
        yield (
            f"parallel.memory.late_steps={memory.late_steps}: this model has no MoE layers, so no "
            "experts without tokens: set it to 0"
        )
    if not plan.zero or memory.parameters.is_device:
        return
    start = (
        f"parallel.memory.parameters={type(memory.parameters).__name__} with "
        f"parallel.plan.zero={plan.zero}: ZeRO shards"
    )
    if not expert_counts and (plan.data or 1) * plan.context > 1:
        yield (
            f"{start} all weights of this model, which has no MoE layers, so none is left to it: "
            "set parameters to DeviceMemory, or zero to 0"
        )
    for number in expert_counts:
        copies = plan.axes(num_experts=number)["expert_data"]
        if copies > 1:
            yield (
                f"{start} the {number} experts of a layer over the {copies} ranks with copies of "
                "each: set parallel.plan.expert so that there is one copy, or zero to 0"
            )


def pipeline_problems(stages: PipelineStages, *, micro_batches: int, zero: int) -> Iterator[str]:
    """Yield why a step of so many micro-batches cannot run in a pipeline."""
    if problem := stages.problems(micro_batches=micro_batches, zero=zero):
        key = "gradient_accumulation_steps"
        yield f"parallel.pipeline_schedule with {key}={micro_batches}: {problem}"
