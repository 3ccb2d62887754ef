"""Router doctor: which signs of bad routing last, layer by layer, and the same in words.

A sign is believed after ``patience`` intervals in a row and forgotten after as many without it, so
that chance in one interval neither raises nor clears an alarm. Numbers that are not finite are
believed at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesaic.monitor.expert_usage import LayerUsage
from moesaic.monitor.health_rules import (
    HEALTH_RULES,
    HealthFinding,
    HealthState,
    LayerInterval,
    RouterSettings,
)

HISTORY_LENGTH = 8
_SEVERITY = tuple(HealthState)


@dataclass(frozen=True, slots=True)
class _RuleHistory:
    """One sign in one layer: the newest finding, and intervals in a row with or without it."""

    finding: HealthFinding
    intervals_with: int = 0
    intervals_without: int = 0
    confirmed: bool = False


class RouterHealthMonitor:
    """Give it the counts of every interval, in order."""

    def __init__(self, settings: RouterSettings, *, patience: int = 2) -> None:
        self.settings = settings
        self.patience = patience
        self._past_load_entropies: dict[str, tuple[float, ...]] = {}
        self._histories: dict[tuple[str, str], _RuleHistory] = {}

    def check_interval(self, layers: Sequence[LayerUsage]) -> tuple[HealthFinding, ...]:
        """Return what is believed after this interval, worst first."""
        for layer in layers:
            past = self._past_load_entropies.get(layer.layer, ())
            for sign in HEALTH_RULES:
                finding = sign(LayerInterval(layer, self.settings, past))
                self._update((layer.layer, sign.__name__), finding)
            self._past_load_entropies[layer.layer] = (*past, layer.load_entropy)[-HISTORY_LENGTH:]
        believed = [w.finding for w in self._histories.values() if w.confirmed]
        return tuple(sorted(believed, key=lambda f: -_SEVERITY.index(f.state)))

    def _update(self, key: tuple[str, str], finding: HealthFinding | None) -> None:
        watch = self._histories.get(key)
        if finding is not None:
            finding = replace(finding, rule=key[1])
            seen = watch.intervals_with + 1 if watch else 1
            at_once = key[1] == "not_finite"
            believed = at_once or seen >= self.patience or (watch is not None and watch.confirmed)
            self._histories[key] = _RuleHistory(finding, intervals_with=seen, confirmed=believed)
        elif watch is not None:
            absent = watch.intervals_without + 1
            if absent >= self.patience or not watch.confirmed:
                del self._histories[key]
            else:
                self._histories[key] = replace(watch, intervals_with=0, intervals_without=absent)


def state_of(findings: Sequence[HealthFinding], *, layer: str) -> HealthState:
    """Return a layer's worst state."""
    states = [f.state for f in findings if f.layer == layer]
    return max(states, key=_SEVERITY.index, default=HealthState.OK)


def summarize_health(findings: Sequence[HealthFinding]) -> str:
    """Return a few words for a status line: ``healthy``, or the worst finding and how many more."""
    if not findings:
        return "healthy"
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"layer {findings[0].layer} {findings[0].text}{more}"


def describe_findings(findings: Sequence[HealthFinding]) -> list[str]:
    """Return one sentence per finding: what, likely cause, what to try."""
    return [finding.sentence for finding in findings]
