"""Run checks: consistency rules between parts of a run config, one function per rule.

A rule yields complete sentences with the config keys, both values and the reason. Rules inside one
part belong to that part's config class. Nothing is opened or built here.
"""

from collections.abc import Callable, Iterator

from moesaic.core.errors import ConfigError, DataError
from moesaic.corpus.languages import resolve_language
from moesaic.data.collators import DecoderOnlyCollator, EncoderDecoderCollator
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.optim.lr_schedule import WSD, Constant, Cosine, InverseSqrt, warmup_steps
from moesaic.train.run import Run

RunRule = Callable[[Run], Iterator[str]]


def check_run(run: Run) -> None:
    """Raise ConfigError with a sentence for every violated rule."""
    problems = [sentence for rule in RUN_RULES for sentence in rule(run)]
    if problems:
        raise ConfigError(problems)


def vocab_sizes_match(run: Run) -> Iterator[str]:
    """Model and tokenizer have the same vocabulary size."""
    model, tokenizer = run.model.vocab_size, run.tokenizer.vocab_size
    if model != tokenizer:
        yield (
            f"model.vocab_size={model} and tokenizer.vocab_size={tokenizer} must be equal: every "
            "id needs a row of the embedding"
        )


def known_languages(run: Run) -> Iterator[str]:
    """Each language code is valid and unique."""
    found: dict[str, str] = {}
    for index, text in enumerate(run.languages):
        try:
            code = resolve_language(text).code
        except DataError as error:
            yield f"languages.{index}: {error}"
            continue
        if code in found:
            yield f'languages.{index}: "{text}" and "{found[code]}" are both {code}'
        found[code] = text


def collator_fits_the_model(run: Run) -> Iterator[str]:
    """The collator feeds the encoder if and only if the model has one."""
    layers, collator = run.model.encoder.layers, run.loader.collator
    if isinstance(collator, EncoderDecoderCollator) and not layers:
        yield (
            "loader.collator=EncoderDecoderCollator needs an encoder, but model.encoder.layers=0: "
            "give it layers, or choose loader.collator=DecoderOnlyCollator"
        )
    if isinstance(collator, DecoderOnlyCollator) and layers:
        yield (
            f"loader.collator=DecoderOnlyCollator leaves model.encoder.layers={layers} without "
            "input: set them to 0, or choose loader.collator=EncoderDecoderCollator"
        )


def lengths_fit_the_positions(run: Run) -> Iterator[str]:
    """The longest rows fit into a learned position table."""
    if not isinstance(run.model.position, LearnedPositions):
        return
    for side in ("max_source", "max_target"):
        longest, positions = run.loader.to_dict()[side], run.model.position.max_length
        if isinstance(longest, int) and longest > positions:
            yield (
                f"loader.{side}={longest} is longer than the position table "
                f"(model.position.max_length={positions}): shorten the one or lengthen the other"
            )


def longest_row_fits_a_batch(run: Run) -> Iterator[str]:
    """A row of the maximum length fits into a micro-batch."""
    loader = run.loader
    source = 0 if isinstance(loader.collator, DecoderOnlyCollator) else loader.max_source
    if loader.batch_tokens < source + loader.max_target:
        yield (
            f"loader.batch_tokens={loader.batch_tokens} cannot hold one row of "
            f"loader.max_source={source} and loader.max_target={loader.max_target}: at least "
            f"{source + loader.max_target}"
        )


def batches_can_be_filled(run: Run) -> Iterator[str]:
    """A window of draws has the tokens of a micro-batch."""
    loader = run.loader
    most = loader.bucket_window * (loader.max_source + loader.max_target)
    if loader.batch_tokens > most:
        yield (
            f"loader.batch_tokens={loader.batch_tokens} is more than loader.bucket_window="
            f"{loader.bucket_window} rows of at most loader.max_source={loader.max_source} and "
            f"loader.max_target={loader.max_target} tokens can fill: at most {most}"
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
    micro_batches = run.gradient_accumulation_steps
    problem = parallel.pipeline_stages(run.model).problems(
        micro_batches=micro_batches, zero=parallel.plan.zero
    )
    if problem:
        key = "gradient_accumulation_steps"
        yield f"parallel.pipeline_schedule with {key}={micro_batches}: {problem}"


RUN_RULES: tuple[RunRule, ...] = (
    vocab_sizes_match,
    known_languages,
    collator_fits_the_model,
    lengths_fit_the_positions,
    longest_row_fits_a_batch,
    batches_can_be_filled,
    schedule_fits_the_steps,
    pipeline_has_enough_micro_batches,
)
