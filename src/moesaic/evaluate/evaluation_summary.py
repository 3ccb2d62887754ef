"""Evaluation summary: all scores of an evaluation, as frozen values and as ``summary.json``.

The file::

    {"format": 1, "run": "demo", "created": "2026-11-22T10:00:00+00:00",
     "systems": ["model", "copy", "memory"],           # the first is the one under test
     "languages": {
       "deu_Latn": {            # TestSet.key: "deu_Latn-eng_Latn" if not from English
         "name": "German", "source": "eng_Latn", "target": "deu_Latn",
         "test": "catalogues-small test", "count": 200, "of": 1034,
         "signatures": {"chrf": "...", "bleu": "..."},
         "model": {"chrf": {"score": 41.2, "low": 39.0, "high": 43.5}, "bleu": {...},
                   "off_target": {"script": {"rate": 0.0, "off": 0, "counted": 190, "note": ""},
                                  "identified": {...}},
                   "empty": 0, "seconds": 1.9},
         "copy": {...}, "memory": {...},
         "differences": {"copy": {"chrf": {"difference": 20.1, "low": .., "high": .., "p": 0.001},
                                  "verdict": "better"}, "memory": {...}},
         "samples": [{"source": "...", "reference": "...", "model": "...", "copy": "...",
                      "memory": "...", "experts": {...}}]}},   # experts: ExpertTrace.to_dict()
     "mean": {"model": {"chrf": {...}, "bleu": {...}}, ...},   # macro average over the keys above
     "mean_differences": {"copy": {"chrf": {...}, "verdict": "better"}, ...},
     "verdicts": {"memory": {"better": [], "worse": ["deu_Latn"], "unclear": []}, ...},
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
from moesaic.corpus.languages import resolve_language
from moesaic.evaluate.bootstrap import ScoreDifference, ScoreInterval
from moesaic.evaluate.testset import TestSet
from moesaic.evaluate.translation_metrics import OffTargetRate, OffTargetRates

SUMMARY_FORMAT = 1
VERDICTS = ("better", "worse", "unclear")
_PACKAGES = ("moesaic", "torch", "numpy", "tokenizers", "sacrebleu", "safetensors", "py3langid")


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One system on one test set; ``scores`` by metric name."""

    scores: dict[str, ScoreInterval]
    off_target: OffTargetRates
    empty: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        off = {
            "script": _rate_to_dict(self.off_target.script),
            "identified": _rate_to_dict(self.off_target.identified),
        }
        return {
            **{name: _round_values(asdict(score)) for name, score in self.scores.items()},
            "off_target": off,
            "empty": self.empty,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class SampleTranslation:
    """A test sentence with every system's output; ``experts`` is the caller's expert trace."""

    source: str
    reference: str
    outputs: dict[str, str]
    experts: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        shown = {"source": self.source, "reference": self.reference, **self.outputs}
        return shown | ({"experts": self.experts} if self.experts else {})


@dataclass(frozen=True, slots=True)
class TestSetResult:
    """All systems on one test set. ``differences`` are the first system's lead over the others."""

    test: TestSet
    signatures: dict[str, str]
    systems: dict[str, SystemResult]
    differences: dict[str, dict[str, ScoreDifference]]
    samples: tuple[SampleTranslation, ...]

    def to_dict(self) -> dict[str, Any]:
        test = self.test
        other = test.target if test.key == test.target else test.source
        return {
            "name": resolve_language(other).name,
            "source": test.source,
            "target": test.target,
            "test": test.name,
            "count": len(test),
            "of": test.total_count or len(test),
            "signatures": self.signatures,
            **{name: system.to_dict() for name, system in self.systems.items()},
            "differences": {name: _differences_to_dict(d) for name, d in self.differences.items()},
            "samples": [sample.to_dict() for sample in self.samples],
        }


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

    def verdicts(self) -> dict[str, dict[str, list[str]]]:
        """Return per other system the languages where the first is better, worse, unclear."""
        found = {s: {v: list[str]() for v in VERDICTS} for s in self.systems[1:]}
        for key, result in self.languages.items():
            for other, difference in result.differences.items():
                found[other][verdict(difference)].append(key)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return {
            "format": SUMMARY_FORMAT,
            "run": self.run,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "systems": list(self.systems),
            "languages": {key: result.to_dict() for key, result in self.languages.items()},
            "mean": {
                system: {name: _round_values(asdict(score)) for name, score in scores.items()}
                for system, scores in self.mean.items()
            },
            "mean_differences": {
                other: _differences_to_dict(found) for other, found in self.mean_differences.items()
            },
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "counts": self.counts,
            "seconds": {phase: round(s, 3) for phase, s in self.seconds.items()},
            "versions": package_versions(),
        }

    def write(self, path: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_json(path, self.to_dict())


def verdict(differences: dict[str, ScoreDifference]) -> str:
    """Return ``better``, ``worse`` or ``unclear`` by the first metric's interval."""
    first = next(iter(differences.values()))
    return "better" if first.low > 0 else "worse" if first.high < 0 else "unclear"


def package_versions() -> dict[str, str]:
    """Return the versions of the interpreter, the platform and the packages that affect results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rate_to_dict(rate: OffTargetRate) -> dict[str, Any]:
    share = None if rate.rate is None else round(rate.rate, 4)
    return {"rate": share, "off": rate.off, "counted": rate.counted, "note": rate.note}


def _differences_to_dict(found: dict[str, ScoreDifference]) -> dict[str, Any]:
    return {
        **{name: _round_values(asdict(difference)) for name, difference in found.items()},
        "verdict": verdict(found),
    }


def _round_values(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4 if name == "p" else 2) for name, value in values.items()}
