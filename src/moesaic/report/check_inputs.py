"""Kinds of the values in summary.json and curve.json, checked before a report uses them."""

from collections.abc import Iterator
from typing import Any

_NUMBER = (int, float)
_SUMMARY = {
    **dict.fromkeys(("languages", "mean", "mean_differences", "verdicts", "verdicts_bleu"), dict),
    **dict.fromkeys(("counts", "seconds", "versions", "placeholders"), dict),
    **dict.fromkeys(("systems", "notes", "disagreements"), list),
}
_LANGUAGE = {
    **dict.fromkeys(("differences", "signatures", "groups", "off_target"), dict),
    "samples": list,
    "name": str,
}


def check_summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json. Raises ValueError naming a value of another kind."""
    _check(found, _SUMMARY, "")
    for key, result in (found.get("languages") or {}).items():
        _check({key: result}, {key: dict}, "languages.")
        _check(result, _LANGUAGE, f"languages.{key}.")
    for name in ("mean", "mean_differences", "verdicts", "verdicts_bleu", "placeholders"):
        for key, value in (found.get(name) or {}).items():
            _check({key: value}, {key: dict}, f"{name}.")
    for path, score in _scores(found):
        for end in ("score", "low", "high"):
            _check(score, {end: _NUMBER}, f"{path}.")
    return found


def check_score_curve(found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of curve.json. Raises ValueError naming a value of another kind."""
    _check(found, {"points": list, "baselines": dict}, "")
    for number, point in enumerate(found.get("points") or []):
        where = f"points.{number}"
        _check({where: point}, {where: dict}, "")
        _require(point, {"step": _NUMBER, "chrf": dict}, f"{where}.")
        _require(point["chrf"], {"score": _NUMBER}, f"{where}.chrf.")
    for name, score in (found.get("baselines") or {}).items():
        _check({name: score}, {name: dict}, "baselines.")
        _require(score, {"score": _NUMBER}, f"baselines.{name}.")
    return found


def check_perplexity(found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of perplexity.json. Raises ValueError naming a value of another kind."""
    _check(found, {"groups": list, "window": _NUMBER, "stride": _NUMBER, "texts": str}, "")
    for number, group in enumerate(found.get("groups") or []):
        where = f"groups.{number}"
        _check({where: group}, {where: dict}, "")
        kinds = {"name": str, "documents": _NUMBER, "tokens": _NUMBER}
        _require(group, kinds | {"perplexity": dict, "bits_per_byte": dict}, f"{where}.")
        for name in ("perplexity", "bits_per_byte"):
            ends: dict[str, Any] = dict.fromkeys(("score", "low", "high"), _NUMBER)
            _require(group[name], ends, f"{where}.{name}.")
    return found


def check_head_scores(found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of head-scores.json. Raises ValueError naming a value of another kind."""
    _require(found, {"split": str, "scores": dict}, "")
    for name, by_label in found["scores"].items():
        _check({name: by_label}, {name: dict}, "scores.")
        for label, score in by_label.items():
            kinds: dict[str, Any] = dict.fromkeys(("score", "low", "high", "rows"), _NUMBER)
            _require(score, kinds, f"scores.{name}.{label}.")
    return found


def _scores(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every score with its path: of each language and system, and of the means."""
    systems = [name for name in found.get("systems") or [] if isinstance(name, str)]
    places = {f"languages.{k}": v for k, v in (found.get("languages") or {}).items()}
    for place, result in (places | {"mean": found.get("mean") or {}}).items():
        for system in systems:
            _check(result, {system: dict}, f"{place}.")
            for metric in ("chrf", "bleu"):
                scores = (result.get(system) or {}).get(metric) or {}
                _check({metric: scores}, {metric: dict}, f"{place}.{system}.")
                yield f"{place}.{system}.{metric}", scores


def _require(value: Any, kinds: dict[str, Any], where: str) -> None:
    _check(value, {}, where)
    for name in kinds:
        if value.get(name) is None:
            raise ValueError(f"{where}{name} is missing")
    _check(value, kinds, where)


def _check(value: Any, kinds: dict[str, Any], where: str) -> None:
    """Raise ValueError unless ``value`` is a mapping and each value in it is of its kind."""
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ValueError(f"{where.removesuffix('.')}: found {found}, expected a mapping")
    for name, kind in kinds.items():
        part = value.get(name)
        if part is not None and (not isinstance(part, kind) or isinstance(part, bool)):
            names = {dict: "a mapping", list: "a list", str: "text"}
            wanted = "a number" if kind is _NUMBER else names[kind]
            raise ValueError(f"{where}{name}: found {type(part).__name__}, expected {wanted}")
