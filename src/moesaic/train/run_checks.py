"""Checks: what must hold between the parts of a run, one small function per rule.

A rule returns finished sentences, each with the paths, both values and the reason; a part's own
rules are the part's. Everything here is arithmetic on the config: nothing is opened or built.
"""

from collections.abc import Callable, Iterator

from moesaic.core.errors import ConfigError, DataError
from moesaic.corpus.languages import resolve_language
from moesaic.data.collators import DecoderOnlyCollator, EncoderDecoderCollator
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.optim.lr_schedule import WSD, Cosine
from moesaic.train.run import Run

RunRule = Callable[[Run], Iterator[str]]


def check_run(run: Run) -> None:
    """Raise ConfigError with a sentence for every rule that the run breaks."""
    problems = [sentence for rule in RUN_RULES for sentence in rule(run)]
    if problems:
        raise ConfigError(problems)


def vocab_sizes_match(run: Run) -> Iterator[str]:
    """The embedding has a row for every id."""
    model, tokenizer = run.model.vocab_size, run.tokenizer.vocab_size
    if model != tokenizer:
        yield (
            f"model.vocab_size={model} and tokenizer.vocab_size={tokenizer} must be equal: every "
            "id needs a row of the embedding"
        )


def known_languages(run: Run) -> Iterator[str]:
    """Each language is one we know, and there once."""
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


def layout_fits_the_model(run: Run) -> Iterator[str]:
    """An encoder has a source to read."""
    layers, layout = run.model.encoder.layers, run.loader.collator
    if isinstance(layout, EncoderDecoderCollator) and not layers:
        yield (
            "loader.collator=EncoderDecoderCollator needs an encoder, but model.encoder.layers=0: give it "
            "layers, or choose loader.collator=DecoderOnlyCollator"
        )
    if isinstance(layout, DecoderOnlyCollator) and layers:
        yield (
            f"loader.collator=DecoderOnlyCollator leaves model.encoder.layers={layers} without input: set "
            "them to 0, or choose loader.collator=EncoderDecoderCollator"
        )


def lengths_fit_the_positions(run: Run) -> Iterator[str]:
    """The longest rows have a place in a learned position table."""
    if not isinstance(run.model.position, LearnedPositions):
        return
    for side in ("max_source", "max_target"):
        longest, room = run.loader.to_dict()[side], run.model.position.max_length
        if isinstance(longest, int) and longest > room:
            yield (
                f"loader.{side}={longest} is longer than the table model.position.max_length={room}: "
                "shorten the one or lengthen the other"
            )


def longest_row_fits_a_batch(run: Run) -> Iterator[str]:
    """A row at the length limits is a batch."""
    loader = run.loader
    source = 0 if isinstance(loader.collator, DecoderOnlyCollator) else loader.max_source
    if loader.batch_tokens < source + loader.max_target:
        yield (
            f"loader.batch_tokens={loader.batch_tokens} cannot hold one row of "
            f"loader.max_source={source} and loader.max_target={loader.max_target}: at least "
            f"{source + loader.max_target}"
        )


def schedule_fits_the_steps(run: Run) -> Iterator[str]:
    """Warm-up ends before the run or its decay does."""
    schedule = run.schedule
    if isinstance(schedule, WSD):
        flat = run.steps * (1 - schedule.decay)
        if schedule.warmup > flat:
            yield (
                f"schedule.warmup={schedule.warmup} does not end before the decay begins, at step "
                f"{flat:.0f} (steps={run.steps}, schedule.decay={schedule.decay}): shorten it"
            )
    if isinstance(schedule, Cosine) and schedule.warmup >= run.steps:
        yield f"schedule.warmup={schedule.warmup} must be less than steps={run.steps}"


def pipeline_has_enough_micro_batches(run: Run) -> Iterator[str]:
    """A step has enough micro-batches for the schedule, and the schedule is right with ZeRO."""
    parallel = run.parallel
    if parallel.plan.pipe == 1:
        return
    why = parallel.pipeline_stages(run.model).problems(
        micro_batches=run.gradient_accumulation_steps, zero=parallel.plan.zero
    )
    if why:
        yield f"parallel.pipeline_schedule with gradient_accumulation_steps={run.gradient_accumulation_steps} micro-batches: {why}"


RUN_RULES: tuple[RunRule, ...] = (
    vocab_sizes_match,
    known_languages,
    layout_fits_the_model,
    lengths_fit_the_positions,
    longest_row_fits_a_batch,
    schedule_fits_the_steps,
    pipeline_has_enough_micro_batches,
)
