"""The forgetting guard of ``moesaic eval``: what a warm start did to what it was not tuned in."""

from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.evaluated_run import EvaluatedRun
from moesaic.core.errors import UserError
from moesaic.evaluate.harness import EvaluationSettings
from moesaic.evaluate.testset import corpus_testsets
from moesaic.model.beam_search import Search
from moesaic.report.forgetting_section import count_worse
from moesaic.serve.forgetting import score_forgetting
from moesaic.train.warm_start import WeightsOfRun


def write_forgetting(
    evaluated: EvaluatedRun,
    *,
    limit: int | None,
    search: Search | None,
    settings: EvaluationSettings,
) -> str | None:
    """Write ``forgetting.json`` of a run that started from another one that translates.

    Returns a note of what was found, or why it cannot be scored; None if there is nothing to score.
    """
    start, record = evaluated.config.initial_weights, evaluated.record
    if not isinstance(start, WeightsOfRun) or record is None:
        return None
    try:
        before = EvaluatedRun.open(Path(start.path))
        own, corpus = set(record.own_directions), before.corpus().corpus
        others = [pair for pair in before.trained_directions(corpus) if pair not in own]
        tests = corpus_testsets(corpus, directions=others, split="test", limit=limit)
        if not tests:
            return None
        summary = score_forgetting(
            evaluated.path, before=before.path, tests=tests, search=search, settings=settings
        )
    except UserError as error:
        return f"what was not tuned is not scored: {error}"
    summary.write(RunDir(evaluated.path).forgetting)
    changes = [r["differences"]["before"]["chrf"] for r in summary.to_dict()["languages"].values()]
    return f"{count_worse(changes)} (forgetting.json)"
