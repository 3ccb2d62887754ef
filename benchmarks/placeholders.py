"""Placeholders, tags and URLs that translations keep: ways to keep them, on the same strings.

    python benchmarks/placeholders.py runs/demo --corpus data/corpora/catalogues-small --label copy

Each run is decoded in several ways. With copy units: with and without the constraint. Without them:
the first hypothesis of a beam that keeps all placeholders, and placeholders replaced before
decoding by the names that the training text has most often. Scores are means over the directions
to the languages of the run; the rate is the share of texts with placeholders in source or answer
that kept all of them. A label's rows in the result file are replaced, others are kept.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support import write_result

from moesaic.corpus.corpus import Corpus
from moesaic.corpus.placeholders import (
    PlaceholderRate,
    compare_placeholders,
    find_placeholders,
    measure_placeholders,
    replace_placeholders,
)
from moesaic.evaluate.harness import EvaluationSettings, evaluate
from moesaic.evaluate.testset import TestSet, corpus_testsets
from moesaic.model.beam_search import Beam, Search
from moesaic.model.copy_constraint import CopyConstraint
from moesaic.serve.translator import Translator

OUT = Path(__file__).parent / "results/placeholders.json"


def without_constraint(
    translator: Translator, texts: list[str], *, source: str, target: str
) -> list[str]:
    """Translate with copy units alone."""
    with patch.object(CopyConstraint, "__call__", lambda _self, _ids, _source, found: found):
        return translator.translate_texts(texts, source=source, target=target)


def best_of_beam(
    translator: Translator, texts: list[str], *, source: str, target: str, size: int = 8
) -> list[str]:
    """Return the first hypothesis that keeps all placeholders, else the first."""
    search = Beam(size=size, n_best=size)
    found = translator.translate(texts, source=source, target=target, search=search)
    return [
        _first_that_keeps(text, result.alternatives)
        for text, result in zip(texts, found, strict=True)
    ]


def _first_that_keeps(text: str, alternatives: Any) -> str:
    answers = [alternative.text for alternative in alternatives] or [""]
    return next((a for a in answers if compare_placeholders(text, a).rate == 1), answers[0])


def by_frequent_names(
    translator: Translator, names: list[str], texts: list[str], *, source: str, target: str
) -> list[str]:
    """Replace placeholders by frequent ones before decoding, and put them back after it."""
    own = [list(dict.fromkeys(p.text for p in find_placeholders(text))) for text in texts]
    tables = [dict(zip(found, names, strict=False)) for found in own]
    replaced = [_exchange(text, table) for text, table in zip(texts, tables, strict=True)]
    answers = translator.translate_texts(replaced, source=source, target=target)
    return [
        _exchange(a, {v: k for k, v in t.items()}) for a, t in zip(answers, tables, strict=True)
    ]


def _exchange(text: str, table: dict[str, str]) -> str:
    return replace_placeholders(text, (table.get(p.text, p.text) for p in find_placeholders(text)))


def frequent_names(corpus: Corpus, tests: list[TestSet], *, count: int = 8) -> list[str]:
    """Return the placeholders that train sources have most often."""
    seen: Counter[str] = Counter()
    for test in tests:
        for pair in corpus.iter_pairs(test.source, test.target, split="train"):
            seen.update(p.text for p in find_placeholders(pair.source))
    return [name for name, _ in seen.most_common(count)]


def systems_of(
    translator: Translator, corpus: Corpus, tests: list[TestSet]
) -> dict[str, Callable[..., list[str]]]:
    search: Search = Beam(size=4)
    systems: dict[str, Callable[..., list[str]]] = {
        "greedy": translator.translate_texts,
        "beam 4": partial(translator.translate_texts, search=search),
    }
    if translator.tokenizer.copies.ids:
        return systems | {"greedy, no constraint": partial(without_constraint, translator)}
    names = frequent_names(corpus, tests)
    return systems | {
        "best of beam 8": partial(best_of_beam, translator),
        "frequent names": partial(by_frequent_names, translator, names),
    }


class _Recording:
    """A system that keeps the sum of its placeholder rates."""

    def __init__(self, system: Callable[..., list[str]]) -> None:
        self._system, self.total = system, PlaceholderRate()

    def __call__(self, texts: list[str], *, source: str, target: str) -> list[str]:
        answers = self._system(texts, source=source, target=target)
        self.total += measure_placeholders(texts, answers)
        return answers


def measure(run: Path, corpus: Corpus, *, label: str) -> list[dict[str, Any]]:
    """Return a row per way of decoding a run."""
    translator = Translator.open(run)
    tests = [
        t for t in corpus_testsets(corpus) if {t.source, t.target} <= set(translator.languages)
    ]
    systems = {name: _Recording(s) for name, s in systems_of(translator, corpus, tests).items()}
    summary = evaluate(systems, tests=tests, settings=EvaluationSettings(resamples=200))
    return [
        {
            "model": label,
            "decoding": name,
            "kept": round(100 * system.total.rate, 1),
            "texts": system.total.texts,
            "kept_texts": system.total.kept_texts,
            "chrf": round(summary.mean[name]["chrf"].score, 1),
            "chrf_interval": [round(getattr(summary.mean[name]["chrf"], k), 1) for k in LIMITS],
            "bleu": round(summary.mean[name]["bleu"].score, 1),
        }
        for name, system in systems.items()
    ]


LIMITS = ("low", "high")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("--corpus", type=Path, required=True)
    options.add_argument("--label", required=True)
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args()
    rows = measure(given.run, Corpus.open(given.corpus), label=given.label)
    known = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    others = [row for row in known if row["model"] != given.label]
    write_result(given.out, {"rows": [*others, *rows]})


if __name__ == "__main__":
    main()
