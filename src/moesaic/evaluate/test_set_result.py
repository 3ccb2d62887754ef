"""Results of an evaluation on one test set: of each system, with differences and samples."""

from dataclasses import asdict, dataclass, field
from typing import Any

from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.placeholders import PlaceholderRate
from moesaic.evaluate.bootstrap import ScoreDifference, ScoreInterval
from moesaic.evaluate.row_groups import GroupScores
from moesaic.evaluate.testset import TestSet
from moesaic.evaluate.translation_metrics import OffTargetRate, OffTargetRates

NO_PLACEHOLDERS = PlaceholderRate()


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One system on one test set; ``scores`` by metric name.

    ``placeholders``: how many of the sources' placeholders, tags and URLs are in the outputs.
    ``raw_scores`` are against the references before they were normalised; empty if they were not.
    """

    scores: dict[str, ScoreInterval]
    off_target: OffTargetRates
    empty: int
    seconds: float
    placeholders: PlaceholderRate = NO_PLACEHOLDERS
    raw_scores: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        off = {
            "script": _rate_to_dict(self.off_target.script),
            "identified": _rate_to_dict(self.off_target.identified),
        }
        return {
            **{name: round_values(asdict(score)) for name, score in self.scores.items()},
            "off_target": off,
            "empty": self.empty,
            "placeholders": placeholders_to_dict(self.placeholders),
            "raw_references": {name: round(v, 2) for name, v in self.raw_scores.items()},
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
    groups: dict[str, GroupScores] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        test = self.test
        return {
            "name": direction_name(test.source, test.target),
            "source": test.source,
            "target": test.target,
            "test": test.name,
            "count": len(test),
            "of": test.total_count or len(test),
            "strings": test.digest,
            "signatures": self.signatures,
            **{name: system.to_dict() for name, system in self.systems.items()},
            "differences": {name: differences_to_dict(d) for name, d in self.differences.items()},
            "groups": {name: group.to_dict() for name, group in self.groups.items()},
            "samples": [sample.to_dict() for sample in self.samples],
        }


def verdict(difference: ScoreDifference) -> str:
    """Return ``better``, ``worse`` or ``unclear`` by the interval of a difference."""
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "unclear"


def direction_name(source: str, target: str) -> str:
    """Return the English name of the target, or of both languages if the source is another one."""
    names = [resolve_language(code).name for code in (source, target)]
    return names[1] if source == ENGLISH else " → ".join(names)


def placeholders_to_dict(rate: PlaceholderRate) -> dict[str, Any]:
    """Return a rate as in summary.json: of the rows with placeholders, and of placeholders."""
    share = round(rate.rate, 4) if rate.texts else None
    return {
        "rate": share,
        "kept": rate.kept_texts,
        "of": rate.texts,
        "placeholders": rate.placeholders,
        "placeholders_kept": rate.kept,
        "added": rate.added,
    }


def _rate_to_dict(rate: OffTargetRate) -> dict[str, Any]:
    share = None if rate.rate is None else round(rate.rate, 4)
    return {"rate": share, "off": rate.off, "counted": rate.counted, "note": rate.note}


def differences_to_dict(found: dict[str, ScoreDifference]) -> dict[str, Any]:
    """Return differences by metric as in summary.json, with the verdict by chrF++."""
    return {
        **{name: round_values(asdict(difference)) for name, difference in found.items()},
        "verdict": verdict(found["chrf"]),
    }


def round_values(values: dict[str, float]) -> dict[str, float]:
    """Round scores to two digits, and p-values to four."""
    return {name: round(value, 4 if name.startswith("p") else 2) for name, value in values.items()}
