"""Evaluation summary: all scores of an evaluation, as frozen values and as ``summary.json``.

The file::

    {"format": 1, "run": "demo", "created": "2026-11-22T10:00:00+00:00",
     "systems": ["model", "copy", "memory"],           # the first is the one under test
     "languages": {
       "deu_Latn": {            # TestSet.key: "deu_Latn-eng_Latn" if not from English
         "name": "German", "source": "eng_Latn", "target": "deu_Latn",
         "test": "catalogues-small test", "count": 200, "of": 1034, "strings": "<sha256>",
         "signatures": {"chrf": "...", "bleu": "..."},
         "model": {"chrf": {"score": 41.2, "low": 39.0, "high": 43.5}, "bleu": {...},
                   "off_target": {"script": {"rate": 0.0, "off": 0, "counted": 190, "note": ""},
                                  "identified": {...}},
                   "empty": 0, "raw_references": {}, "seconds": 1.9,
                   "placeholders": {"rate": 0.37, "kept": 49, "of": 133, "placeholders": 180,
                                    "placeholders_kept": 90, "added": 2}},
         "copy": {...}, "memory": {...},
         "differences": {"copy": {"chrf": {"difference": 20.1, "low": .., "high": .., "p": 0.001,
                                           "p_sacrebleu": 0.001},
                                  "verdict": "better"}, "memory": {...}},
         "groups": {"seen": {"count": 210, "rest": 30, "inside": {"model": {"chrf": 100.0, ..}},
                             "outside": {...}}, "copied": ..., "marked": ...},   # row_groups.py
         "samples": [{"source": "...", "reference": "...", "model": "...", "copy": "...",
                      "memory": "...", "experts": {...}}]}},   # experts: ExpertTrace.to_dict()
     "mean": {"model": {"chrf": {...}, "bleu": {...}}, ...},   # macro average over the keys above
     "mean_differences": {"copy": {"chrf": {...}, "verdict": "better"}, ...},
     "verdicts": {"memory": {"better": [], "worse": ["deu_Latn"], "unclear": []}, ...},
     "verdicts_bleu": {...}, "disagreements": ["By chrF++ ..., by BLEU ..."],
     "placeholders": {"model": {...}, ...},
     "notes": ["spBLEU not computed: ..."],
     "counts": {...}, "seconds": {"train": 300.0, ...}, "versions": {"python": "3.11.7", ...}}

A verdict is ``better`` or ``worse`` when the 95 % interval of the chrF++ difference excludes zero.
``counts`` and ``seconds`` come from the caller, ``versions`` from this machine.
"""

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from moesaic.core.files import write_json
from moesaic.corpus.placeholders import PlaceholderRate
from moesaic.evaluate.bootstrap import ScoreDifference, ScoreInterval
from moesaic.evaluate.metric_disagreement import metric_disagreements
from moesaic.evaluate.test_set_result import (
    TestSetResult,
    differences_to_dict,
    placeholders_to_dict,
    round_values,
    verdict,
)

SUMMARY_FORMAT = 1
VERDICTS = ("better", "worse", "unclear")
_PACKAGES = ("moesaic", "torch", "numpy", "tokenizers", "sacrebleu", "safetensors", "py3langid")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """Results of an evaluation; ``with_run_facts`` adds the caller's facts, ``write`` stores it."""

    systems: tuple[str, ...]
    languages: dict[str, TestSetResult]
    mean: dict[str, dict[str, ScoreInterval]]
    mean_differences: dict[str, dict[str, ScoreDifference]]
    notes: tuple[str, ...] = ()
    run: str = ""
    counts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def with_run_facts(
        self, *, run: str = "", counts: dict[str, Any], seconds: dict[str, float]
    ) -> "EvaluationSummary":
        """Return a copy with the run's name, further counts and seconds by phase."""
        return replace(
            self,
            run=run or self.run,
            counts=self.counts | counts,
            seconds=self.seconds | seconds,
        )

    def with_notes(self, notes: Iterable[str]) -> "EvaluationSummary":
        """Return a copy with further notes, before the present ones."""
        return replace(self, notes=(*notes, *self.notes))

    def verdicts(self, metric: str = "chrf") -> dict[str, dict[str, list[str]]]:
        """Return per other system the languages where the first is better, worse, unclear."""
        found = {s: {v: list[str]() for v in VERDICTS} for s in self.systems[1:]}
        for key, result in self.languages.items():
            for other, difference in result.differences.items():
                found[other][verdict(difference[metric])].append(key)
        return found

    def placeholders(self, system: str) -> PlaceholderRate:
        """Return the placeholder rate of a system over all test sets."""
        rates = (result.systems[system].placeholders for result in self.languages.values())
        return sum(rates, PlaceholderRate())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return {
            "format": SUMMARY_FORMAT,
            "run": self.run,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "systems": list(self.systems),
            "languages": {key: result.to_dict() for key, result in self.languages.items()},
            "mean": {
                system: {name: round_values(asdict(score)) for name, score in scores.items()}
                for system, scores in self.mean.items()
            },
            "mean_differences": {
                other: differences_to_dict(found) for other, found in self.mean_differences.items()
            },
            "verdicts": self.verdicts(),
            "verdicts_bleu": self.verdicts("bleu"),
            "disagreements": list(metric_disagreements(self.systems, self.languages)),
            "placeholders": {s: placeholders_to_dict(self.placeholders(s)) for s in self.systems},
            "notes": list(self.notes),
            "counts": self.counts,
            "seconds": {phase: round(s, 3) for phase, s in self.seconds.items()},
            "versions": package_versions(),
        }

    def write(self, path: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_json(path, self.to_dict())


def package_versions() -> dict[str, str]:
    """Return the versions of the interpreter, the platform and the packages that affect results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
