"""Learning curve: translation scores of each kept checkpoint of a run on the same test sets.

The file ``curve.json`` (``tokens`` as of the last row of metrics by then)::

    {"format": 1, "test": "corpus50 test", "limit": 20, "languages": ["deu_Latn", ...],
     "strings": "<sha256>",
     "baselines": {"copy": {"score": 18.2, "low": .., "high": ..}, "memory": {...}},
     "points": [{"step": 250, "weights": "<sha256>", "tokens": 987000,
                 "chrf": {"score": .., "low": .., "high": ..}, "languages": {"deu_Latn": 12.3}}]}

Scores are chrF++ averaged over the languages, with 95 % intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from moesaic.checkpoint.checkpoint_directory import list_checkpoints
from moesaic.checkpoint.manifest import Manifest, verify_checkpoint
from moesaic.checkpoint.run_directory import SCORE_CURVE_FILE, RunDir
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import read_json_mapping
from moesaic.core.files import write_json
from moesaic.corpus.corpus import Corpus
from moesaic.evaluate.baselines import TranslationMemorySystem, copy_source
from moesaic.evaluate.bootstrap import ScoreInterval
from moesaic.evaluate.evaluation_summary import EvaluationSummary
from moesaic.evaluate.harness import EvaluationSettings, evaluate
from moesaic.evaluate.testset import TestSet
from moesaic.monitor.metric_writers import read_metrics
from moesaic.serve.score import train_pairs
from moesaic.serve.translator import Translator

FORMAT = 1
MODEL = "model.safetensors"
LearningCurve = dict[str, Any]


def learning_curve(
    path: Path,
    *,
    tests: Sequence[TestSet],
    corpus: Corpus,
    limit: int | None = None,
    on_point: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> LearningCurve:
    """Score every kept checkpoint of a run; ``curve.json`` is written after each.

    Points of earlier calls on the same strings are kept, also of checkpoints deleted since, so the
    curve grows during a run. Raises CheckpointError if there is no checkpoint.
    """
    run = RunDir.open(path)
    kept = sorted(list_checkpoints(run.checkpoints))
    if not kept:
        raise CheckpointError(f"{run.checkpoints}: no checkpoint to score; training writes them")
    settings = EvaluationSettings(samples=0)
    curve = _load_or_start_curve(run, tests=tests, limit=limit)
    if not curve["baselines"]:
        memory = TranslationMemorySystem(partial(train_pairs, corpus))
        found = evaluate({"copy": copy_source, "memory": memory}, tests=tests, settings=settings)
        curve["baselines"] = {
            name: _score_json(scores["chrf"]) for name, scores in found.mean.items()
        }
    for checkpoint in kept:
        manifest = verify_checkpoint(checkpoint)
        step, weights = manifest.step, _weights_hash(manifest)
        if any((p["step"], p["weights"]) == (step, weights) for p in curve["points"]):
            continue
        translator = Translator.open(path, weights=checkpoint)
        found = evaluate({"model": translator.translate_texts}, tests=tests, settings=settings)
        point = {"weights": weights} | _curve_point(
            found, step=step, tokens=_tokens_at_step(run, step)
        )
        others = [p for p in curve["points"] if p["step"] != step]
        curve["points"] = sorted([*others, point], key=lambda p: p["step"])
        write_json(run.score_curve, curve)
        on_point(point)
    return curve


def _load_or_start_curve(
    run: RunDir, *, tests: Sequence[TestSet], limit: int | None
) -> LearningCurve:
    """Return the curve of an earlier call on the same strings, or an empty one."""
    digest = sha256()
    for test in tests:
        digest.update("\0".join([*test.sources, *test.references]).encode())
    fresh = {
        "format": FORMAT,
        "test": tests[0].name,
        "limit": limit,
        "languages": [test.key for test in tests],
        "strings": digest.hexdigest(),
    }
    if run.score_curve.is_file():
        found = read_json_mapping(run.score_curve, SCORE_CURVE_FILE)
        if all(found.get(name) == value for name, value in fresh.items()):
            return found
    return fresh | {"baselines": {}, "points": []}


def _weights_hash(manifest: Manifest) -> str:
    """Hash of the weights, or of all files of a sharded checkpoint."""
    if MODEL in manifest.files:
        return manifest.files[MODEL].sha256
    return sha256("".join(e.sha256 for e in manifest.files.values()).encode()).hexdigest()


def _curve_point(found: EvaluationSummary, *, step: int, tokens: float | None) -> LearningCurve:
    by_language = {
        key: round(result.systems["model"].scores["chrf"].score, 2)
        for key, result in found.languages.items()
    }
    chrf = _score_json(found.mean["model"]["chrf"])
    return {"step": step, "tokens": tokens, "chrf": chrf, "languages": by_language}


def _tokens_at_step(run: RunDir, step: int) -> float | None:
    """Return the tokens trained on, by the last row of metrics up to a step."""
    rows = [row for row in read_metrics(run.metrics) if "train/tokens" in row]
    before = [row["train/tokens"] for row in rows if row["step"] <= step]
    return before[-1] if before else None


def _score_json(score: ScoreInterval) -> dict[str, float]:
    return {name: round(value, 2) for name, value in asdict(score).items()}
