"""Run checks: consistency rules between parts of a run config, one function per rule.

A rule yields complete sentences with the config keys, both values and the reason. Rules inside one
part belong to that part's config class. Nothing is opened or built here.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.model.mixer_pattern import parse_pattern
from moesaic.model.transformer import Transformer
from moesaic.optim.lr_schedule import WSD, Constant, Cosine, InverseSqrt, warmup_steps
from moesaic.parallel.plan_problems import pipeline_problems
from moesaic.parallel.sparse_adaptation import SpIEL
from moesaic.parallel.trainable_parameters import AllParameters
from moesaic.train.run import Run
from moesaic.train.warm_start import RandomWeights

RunRule = Callable[[Run], Iterator[str]]


def check_run(run: Run) -> None:
    """Raise ConfigError with a sentence for every violated rule."""
    problems = [sentence for rule in RUN_RULES for sentence in rule(run)]
    if problems:
        raise ConfigError(problems)


def data_fits_the_model(run: Run) -> Iterator[str]:
    """The data has what the model reads and predicts."""
    yield from run.data.problems(run.model)


def every_mixer_is_in_a_block(run: Run) -> Iterator[str]:
    """Each named sequence mixer is in the pattern of a stack that has blocks."""
    stacks = [stack for stack in (run.model.encoder, run.model.decoder) if stack.layers]
    patterns = dict.fromkeys(stack.pattern for stack in stacks)
    named = {name for text in patterns for block in parse_pattern(text) for name in block.names}
    for name in run.model.mixers:
        if name not in named:
            yield (
                f"model.mixers.{name}: no block has this mixer (found the pattern "
                f"{' and '.join(map(repr, patterns))}): name it in model.decoder.pattern or "
                "model.encoder.pattern, or leave it out"
            )


def trainable_parameters_exist(run: Run) -> Iterator[str]:
    """Every pattern of what is trained matches a parameter, under a plan that allows it."""
    if run.trainable != AllParameters():
        model = Transformer.without_values(run.model)
        yield from run.trainable.problems(model)
        parallel = run.parallel
        yield from run.trainable.parallel_problems(parallel.plan, memory=parallel.memory)
    if run.trainable.keeps_base and isinstance(run.initial_weights, RandomWeights):
        kind = type(run.trainable).__name__
        yield (
            f"trainable={kind} changes nothing of the weights that it begins with: name a trained "
            "model (moesaic train --init MODEL), or train all parameters"
        )


def moved_values_have_float32_states(run: Run) -> Iterator[str]:
    """Values whose moments are moved with them have moments that can be."""
    of_experts = nn.Parameter(torch.empty(1, 1, device="meta"))
    rule = run.optimizer.param_group(of_experts, kind="expert")["rule"]
    if isinstance(run.trainable, SpIEL) and rule.state_blocks:
        yield (
            "trainable=SpIEL with optimizer.states=EightBitStates: a value that moves takes its "
            "moments along, and in 8 bits they share a scale with others: set "
            "optimizer.states=Float32States"
        )


def schedule_fits_the_steps(run: Run) -> Iterator[str]:
    """Warm-up ends before the decay or the run."""
    schedule = run.schedule
    if isinstance(schedule, WSD):
        flat = schedule.decay_start(run.steps)
        if warmup_steps(schedule.warmup, steps=run.steps) > flat:
            yield (
                f"schedule.warmup={schedule.warmup} does not end before the decay begins, at step "
                f"{flat:.0f} (steps={run.steps}, schedule.decay={schedule.decay}): shorten it, or "
                "give it as a share of the run (schedule.warmup=0.02)"
            )
    elif (
        isinstance(schedule, Cosine | InverseSqrt | Constant)
        and warmup_steps(schedule.warmup, steps=run.steps) >= run.steps
    ):
        yield (
            f"schedule.warmup={schedule.warmup} must be less than steps={run.steps}: shorten it, "
            "or give it as a share of the run (schedule.warmup=0.02)"
        )


def pipeline_has_enough_micro_batches(run: Run) -> Iterator[str]:
    """The pipeline schedule has enough micro-batches and supports the ZeRO level."""
    parallel = run.parallel
    if parallel.plan.pipe == 1:
        return
    yield from pipeline_problems(
        parallel.pipeline_stages(run.model),
        micro_batches=run.gradient_accumulation_steps,
        zero=parallel.plan.zero,
    )


RUN_RULES: tuple[RunRule, ...] = (
    data_fits_the_model,
    every_mixer_is_in_a_block,
    trainable_parameters_exist,
    moved_values_have_float32_states,
    schedule_fits_the_steps,
    pipeline_has_enough_micro_batches,
)
