"""Forgetting: held-out scores of what a fine-tuned run was not tuned in, before and after.

Both models translate the same strings, so the change has an interval of paired resamples
(``evaluate/harness.py``).
"""

from collections.abc import Sequence
from pathlib import Path

from moesaic.evaluate.evaluation_summary import EvaluationSummary
from moesaic.evaluate.harness import EvaluationSettings, evaluate
from moesaic.evaluate.testset import TestSet
from moesaic.model.beam_search import Search
from moesaic.serve.score import ObservedModel
from moesaic.serve.translator import Translator

AFTER, BEFORE = "model", "before"  # the systems of a forgetting.json


def score_forgetting(
    run: Path,
    *,
    before: Path,
    tests: Sequence[TestSet],
    search: Search | None,
    settings: EvaluationSettings | None = None,
) -> EvaluationSummary:
    """Score a run and the run that it was tuned from on ``tests``; the change is its lead.

    Both search alike: as ``search`` says, or as the tuned one does.
    """
    after = Translator.open(run)
    both = {AFTER: after, BEFORE: Translator.open(before)}
    systems = {n: ObservedModel(each, search or after.search) for n, each in both.items()}
    return evaluate(systems, tests=tests, settings=settings)
