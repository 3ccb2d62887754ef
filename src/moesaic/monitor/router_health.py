"""Router health monitor: which health rules find a fault over several intervals, layer by layer.

A finding is reported after ``patience`` intervals in a row and cleared after as many without it, so
that chance in one interval neither raises nor clears an alarm. Values that are not finite are
reported at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moesaic.monitor.expert_usage import LayerUsage
from moesaic.monitor.health_rules import (
    HEALTH_RULES,
    HealthFinding,
    HealthState,
    LayerInterval,
    not_finite,
)
from moesaic.monitor.router_settings import RouterSettings

HISTORY_LENGTH = 8
_SEVERITY = tuple(HealthState)


@dataclass(frozen=True, slots=True)
class _RuleHistory:
    """One rule in one layer: the newest finding, and intervals in a row with or without it."""

    finding: HealthFinding
    intervals_with: int = 0
    intervals_without: int = 0
    confirmed: bool = False


class RouterHealthMonitor:
    """Applies the health rules to the usage of every interval, given in order.

    ``settings`` are those of each layer, by its name.
    """

    def __init__(self, settings: Mapping[str, RouterSettings], *, patience: int = 2) -> None:
        self.settings = settings
        self.patience = patience
        self._past_load_entropies: dict[str, tuple[float, ...]] = {}
        self._histories: dict[tuple[str, str], _RuleHistory] = {}

    def restore(self, findings: Sequence[HealthFinding]) -> None:
        """Take findings that lasted when the run was stopped as confirmed."""
        for finding in findings:
            self._histories[finding.layer, finding.rule] = _RuleHistory(finding, confirmed=True)

    def check_interval(self, layers: Sequence[LayerUsage]) -> tuple[HealthFinding, ...]:
        """Return the confirmed findings after this interval, worst first."""
        for layer in layers:
            past = self._past_load_entropies.get(layer.layer, ())
            for rule in HEALTH_RULES:
                finding = rule(LayerInterval(layer, self.settings[layer.layer], past))
                self._update((layer.layer, rule.__name__), finding)
            self._past_load_entropies[layer.layer] = (*past, layer.load_entropy)[-HISTORY_LENGTH:]
        confirmed = [h.finding for h in self._histories.values() if h.confirmed]
        return tuple(sorted(confirmed, key=lambda f: -_SEVERITY.index(f.state)))

    def _update(self, key: tuple[str, str], finding: HealthFinding | None) -> None:
        history = self._histories.get(key)
        if finding is not None:
            count = history.intervals_with + 1 if history else 1
            at_once = finding.rule == not_finite.__name__
            confirmed = at_once or count >= self.patience or bool(history and history.confirmed)
            self._histories[key] = _RuleHistory(finding, intervals_with=count, confirmed=confirmed)
        elif history is not None:
            count = history.intervals_without + 1
            if count >= self.patience or not history.confirmed:
                del self._histories[key]
            else:
                self._histories[key] = replace(history, intervals_with=0, intervals_without=count)


def summarize_health(findings: Sequence[HealthFinding]) -> str:
    """Return a few words for a status line: ``healthy``, or the worst finding and how many more."""
    if not findings:
        return "healthy"
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"layer {findings[0].layer} {findings[0].text}{more}"
