"""Comparison of runs: their facts side by side, what is comparable, and where configs differ.

Only numbers of the same thing are put beside each other: losses of runs with one tokenizer (nats
per token of another tokenizer are another unit), and scores on the same strings. What differs is
said, and shown nevertheless.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint.full_checkpoint import config_differences
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import TrainedDirections, read_trained_directions
from moesaic.core.errors import UserError
from moesaic.core.files import sha256
from moesaic.core.units import show_count, show_seconds
from moesaic.report.report_inputs import (
    ReportInputs,
    language_name,
    lookup,
    read_training_and_scores,
)
from moesaic.report.training_sections import latest_value

ABSENT = "–"


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A run under its name in the comparison; ``tokenizer`` is a hash, empty without a file."""

    name: str
    inputs: ReportInputs
    tokenizer: str
    trained: TrainedDirections | None

    def score(self, metric: str, keys: Sequence[str] | None = None) -> float | None:
        """Return the model's mean score over its languages, or over ``keys``; None if unknown."""
        languages = self.inputs.summary.get("languages") or {}
        chosen = list(languages) if keys is None else keys
        found = [lookup(languages.get(key), "model", metric, "score") for key in chosen]
        numbers = [value for value in found if isinstance(value, int | float)]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(found) else None

    def facts(self, common: Sequence[str]) -> dict[str, str]:
        """Return what is put side by side, by title; ``common`` are the languages of all runs."""
        summary, shared = self.inputs.summary, f"mean of the {len(common)} languages in common"
        newest = partial(latest_value, self.inputs)
        return {
            f"chrF++, {shared}": _number(self.score("chrf", common)),
            f"BLEU, {shared}": _number(self.score("bleu", common)),
            "chrF++, mean of the run's languages": _number(self.score("chrf")),
            "BLEU, mean of the run's languages": _number(self.score("bleu")),
            "languages scored": str(len(summary.get("languages") or ())),
            "placeholders kept": _kept(summary),
            "validation loss, nats per token": _number(newest("valid/loss"), 3),
            "training loss, nats per token": _number(newest("train/loss"), 3),
            "steps": _step(self.inputs),
            "tokens trained on": _count(newest("train/tokens")),
            "parameters": _count(lookup(summary, "counts", "parameters")),
            "tokens per second": _count(newest("perf/tokens_per_s")),
            "training time": _time(lookup(summary, "seconds", "train")),
            "corpus": self.trained.corpus if self.trained else ABSENT,
        }

    def strings(self, key: str) -> str:
        """Return what identifies the strings of a language's test set."""
        result = lookup(self.inputs.summary, "languages", key) or {}
        return str(result.get("strings") or (result.get("test"), result.get("count")))


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Runs to be compared, in the order given."""

    runs: tuple[ComparedRun, ...]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "RunComparison":
        """Read run directories. Raises UserError: fewer than two, one twice, or no run."""
        if len(paths) < 2:
            raise UserError("compare needs at least two runs: moesaic compare RUN RUN ...")
        resolved = [path.resolve() for path in paths]
        twice = next((p for p in paths if resolved.count(p.resolve()) > 1), None)
        if twice is not None:
            raise UserError(f"{twice}: given twice; a run is compared with other runs")
        names = _distinct_names(resolved)
        return cls(tuple(_read(p, name) for p, name in zip(paths, names, strict=True)))

    @property
    def common_languages(self) -> list[str]:
        """The keys of the languages that every run was scored in, on the same strings."""
        first, *others = self.runs
        return [
            key
            for key in first.inputs.summary.get("languages") or {}
            if all(
                lookup(other.inputs.summary, "languages", key)
                and other.strings(key) == first.strings(key)
                for other in others
            )
        ]

    def facts(self) -> dict[str, list[str]]:
        """Return by title the values of every run as text; rows without any value are left out."""
        facts = [run.facts(self.common_languages) for run in self.runs]
        rows = {title: [found[title] for found in facts] for title in facts[0]}
        return {title: row for title, row in rows.items() if set(row) != {ABSENT}}

    def scores(self) -> dict[str, list[str]]:
        """Return the model's chrF++ and BLEU of each run by language, those in common first."""
        common = self.common_languages
        keys = dict.fromkeys(common)
        for run in self.runs:
            keys |= dict.fromkeys(run.inputs.summary.get("languages") or {})
        return {
            self._title(key) + ("" if key in common else " (not the same strings)"): [
                f"{_number(run.score('chrf', [key]))} / {_number(run.score('bleu', [key]))}"
                for run in self.runs
            ]
            for key in keys
        }

    def _title(self, key: str) -> str:
        names = (lookup(run.inputs.summary, "languages", key, "name") for run in self.runs)
        return str(next(filter(None, names), language_name(key)))

    def notes(self) -> Iterator[str]:
        """Yield sentences on what is not comparable, and on files that are missing."""
        if len({run.tokenizer for run in self.runs}) > 1:
            yield (
                "The runs have different tokenizers: losses are per token of each one's own "
                "tokenizer and cannot be compared; scores of translations can."
            )
        corpora = {run.trained.fingerprint for run in self.runs if run.trained}
        if len(corpora) > 1:
            yield (
                "The runs were trained on different corpora: a loss is on each one's own held-out "
                "text, and strings that one was not trained on may be in another's training text."
            )
        scored = [run for run in self.runs if run.inputs.summary.get("languages")]
        for run in self.runs:
            if run not in scored:
                yield f"{run.name} has not been scored: moesaic eval {run.name} scores it."
        if len(scored) == len(self.runs) and not self.common_languages:
            yield (
                "No language was scored on the same strings in all runs: their scores cannot be "
                "compared. Score each on one file: moesaic eval RUN --pairs FILE."
            )
        for run in self.runs:
            for name, gap in run.inputs.gaps.items():
                if "could not be read" in gap:
                    yield f"{run.name}, {name}: {gap}"

    def config_differences(self) -> dict[str, list[str]]:
        """Return the config keys whose values differ, with the value of every run."""
        first, *others = (run.inputs.config for run in self.runs)
        found = [config_differences(first, other) for other in others]
        paths = dict.fromkeys(path for differences in found for path in differences)
        rows = {}
        for path in paths:
            own = next(d[path][0] for d in found if path in d)
            rows[path] = [own, *(d[path][1] if path in d else own for d in found)]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "runs": [run.name for run in self.runs],
            "common_languages": self.common_languages,
            "facts": self.facts(),
            "scores": self.scores(),
            "notes": list(self.notes()),
            "config_differences": self.config_differences(),
        }


def _read(path: Path, name: str) -> ComparedRun:
    run = RunDir.open(path)
    tokenizer = sha256(run.tokenizer) if run.tokenizer.is_file() else ""
    return ComparedRun(
        name, read_training_and_scores(run), tokenizer, read_trained_directions(run.directions)
    )


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as make them different."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _number(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _count(value: object) -> str:
    return show_count(value) if isinstance(value, int | float) else ABSENT


def _time(value: object) -> str:
    return show_seconds(value) if isinstance(value, int | float) else ABSENT


def _kept(summary: Mapping[str, Any]) -> str:
    rate = lookup(summary, "placeholders", "model")
    share, count = lookup(rate, "rate"), lookup(rate, "of")
    return f"{share:.0%} of {count}" if isinstance(share, int | float) and count else ABSENT


def _step(inputs: ReportInputs) -> str:
    steps = [series.x[-1] for series in inputs.metrics.values() if series.x]
    return f"{max(steps):,.0f}" if steps else ABSENT
