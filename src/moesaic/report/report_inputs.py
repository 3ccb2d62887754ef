"""Report inputs: the files of a run directory, and a note for each that is missing or damaged."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from moesaic.checkpoint.routes_file import RoutesFile
from moesaic.checkpoint.run_directory import (
    HEAD_SCORES_FILE,
    INSIGHT_FILE,
    PERPLEXITY_FILE,
    SCORE_CURVE_FILE,
    SUMMARY_FILE,
    RunDir,
)
from moesaic.core.errors import UserError
from moesaic.core.file_reader import read_json_mapping, read_text
from moesaic.core.yaml_reader import CONFIG_FILE, read_yaml
from moesaic.corpus.languages import resolve_language
from moesaic.moe.routing_agreement import RoutingAgreement, compare_routes
from moesaic.monitor.expert_usage import RecordedUsage, read_usage
from moesaic.monitor.health_record import RecordedFinding, read_findings
from moesaic.monitor.metric_writers import read_metrics
from moesaic.report.charts import ChartSeries
from moesaic.report.check_inputs import (
    check_head_scores,
    check_perplexity,
    check_score_curve,
    check_summary,
)

T = TypeVar("T")
QUALITY_TITLE = "chrF++ at each checkpoint, mean over languages"
_MAX_DRAWN = 1e30  # larger values are damage, and differences of them overflow
_LANGUAGE_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}(_\w+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """The files of a run. ``gaps`` has one sentence per file that could not be read, by name.

    ``agreement_by_step`` compares the routing of held-out text at each stored step with the last.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: dict[str, ChartSeries] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    forgetting: dict[str, Any] = field(default_factory=dict)
    usage: RecordedUsage | None = None
    health: tuple[RecordedFinding, ...] | None = None
    insight: dict[str, Any] = field(default_factory=dict)
    agreement_by_step: tuple[tuple[int, RoutingAgreement], ...] = ()
    quality_curve: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, Any] = field(default_factory=dict)
    head_scores: dict[str, Any] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)

    def curve(
        self, name: str, *, label: str = "", color: int = 0, dash: int = 0
    ) -> ChartSeries | None:
        """Return one metric as a curve, or None if it was never written."""
        found = self.metrics.get(name)
        return ChartSeries(label or name, found.x, found.y, color, dash) if found else None

    def quality_points(self, *, label: str, color: int = 0) -> ChartSeries | None:
        """Return chrF++ at the scored checkpoints as a curve, or None if there are none."""
        points = self.quality_curve.get("points") or []
        steps = [float(point["step"]) for point in points]
        values = [float(point["chrf"]["score"]) for point in points]
        return ChartSeries(label, steps, values, color) if points else None

    def tasks_and_languages(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the tasks and the languages that have metrics ``prefix/...``."""
        ends = [n.removeprefix(prefix) for n in self.metrics if n.startswith(prefix)]
        languages = [end for end in ends if _LANGUAGE_CODE.fullmatch(end)]
        return [end for end in ends if end not in languages], languages


def read_report_inputs(run: RunDir) -> ReportInputs:
    """Read the files that exist. A missing or damaged file becomes a gap, never an exception."""
    found = read_training_and_scores(run)
    gaps = dict(found.gaps)
    return replace(
        found,
        usage=_read_or_gap(_usage_file(run), _read_usage, None, gaps),
        health=_read_or_gap(run.health, read_findings, None, gaps),
        insight=_read_or_gap(run.insight, _read_insight, {}, gaps),
        agreement_by_step=_read_agreement(run.routing_snapshots, gaps),
        gaps=gaps,
    )


def read_training_and_scores(run: RunDir) -> ReportInputs:
    """Read config, metrics, scores and their curve, without the (larger) files on routing."""
    gaps: dict[str, str] = {}
    text = _read_or_gap(run.config, lambda path: read_text(path, CONFIG_FILE), "", gaps)
    config = _read_or_gap(run.config, lambda _: _require_mapping(read_yaml(text)), {}, gaps)
    name = run.path.resolve().name
    scores: dict[str, Any] = {
        name: _read_or_gap(
            path,
            lambda path, kind=kind, check=check: check(read_json_mapping(path, kind)),
            {},
            gaps if path.exists() or name == "summary" else {},
        )
        for name, path, kind, check in (
            ("summary", run.summary, SUMMARY_FILE, check_summary),
            ("forgetting", run.forgetting, SUMMARY_FILE, check_summary),
            ("perplexity", run.perplexity, PERPLEXITY_FILE, check_perplexity),
            ("head_scores", run.head_scores, HEAD_SCORES_FILE, check_head_scores),
            ("quality_curve", run.score_curve, SCORE_CURVE_FILE, check_score_curve),
        )
    }
    return ReportInputs(
        name=name,
        config=config,
        config_text=text,
        metrics=_read_or_gap(run.metrics, _read_curves, {}, gaps),
        gaps=gaps,
        **scores,
    )


def language_name(code: str) -> str:
    """Return a language's English name; an unknown code or a direction is returned unchanged."""
    try:
        return resolve_language(code).name
    except UserError:
        return code


def _read_or_gap(path: Path, read: Callable[[Path], T], empty: T, gaps: dict[str, str]) -> T:
    if not path.is_file():
        gaps[path.name] = f"There is no {path.name} yet."
        return empty
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        gaps[path.name] = f"{path.name} could not be read: {' '.join(str(error).split())[:200]}"
        return empty


def _require_mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {type(value).__name__}")
    return value


def _usage_file(run: RunDir) -> Path:
    """Return the file of usage counts, which older versions called ``routes.json``."""
    old = run.path / "routes.json"
    return old if old.is_file() and not run.usage.is_file() else run.usage


def _read_usage(path: Path) -> RecordedUsage | None:
    found = read_usage(path)
    return found if any(layer.edges for layer in found.layers) else None


def _read_insight(path: Path) -> dict[str, Any]:
    found = read_json_mapping(path, INSIGHT_FILE)
    if found["format"] != 1:
        raise ValueError(f"format {found['format']}, expected 1")
    keys = {"experts", "null_experts", "uncertainty", "typical", "positions"}
    for name, layer in _require_mapping(found["layers"]).items():
        _require_mapping(layer)
        if "spare" in layer:  # the name of older versions
            layer["null_experts"] = layer.pop("spare")
        if keys - layer.keys():
            raise ValueError(f"layer {name} lacks {', '.join(sorted(keys - layer.keys()))}")
    return found


def _read_agreement(folder: Path, gaps: dict[str, str]) -> tuple[tuple[int, RoutingAgreement], ...]:
    files = sorted(folder.glob("step-*.routes"))
    if not files:
        return ()
    try:
        last = list(RoutesFile(files[-1]))
        steps = [int(path.stem.partition("-")[2]) for path in files]
        return tuple(
            (s, compare_routes(RoutesFile(f), last)) for s, f in zip(steps, files, strict=True)
        )
    except (OSError, ValueError, UserError) as error:
        gaps["learning"] = f"learning could not be read: {' '.join(str(error).split())[:200]}."
        return ()


def _read_curves(path: Path) -> dict[str, ChartSeries]:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(path):
        step = row.get("step")
        for name, value in row.items():
            if name != "step" and step is not None and all(map(_can_be_drawn, (step, value))):
                xs, ys = points.setdefault(name, ([], []))
                xs.append(float(step))
                ys.append(float(value))
    return {name: ChartSeries(name, xs, ys) for name, (xs, ys) in points.items()}


def _can_be_drawn(value: Any) -> bool:
    """Whether a value is a number of a size that an axis can have; NaN is one, and is left out."""
    return isinstance(value, int | float) and not abs(value) > _MAX_DRAWN


def lookup(value: Any, *keys: str) -> Any:
    """Return the value at a path of nested mappings, or None where it is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def to_text(value: object) -> str:
    """Return any JSON value as one line of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
