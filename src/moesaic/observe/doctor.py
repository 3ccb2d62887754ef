"""Router doctor: which signs of bad routing last, layer by layer, and the same in words.

A sign is believed after ``patience`` intervals in a row and forgotten after as many without it, so
that chance in one interval neither raises nor clears an alarm. Numbers that are not finite are
believed at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesaic.observe.layer_counts import LayerCounts
from moesaic.observe.signs import SIGNS, Finding, Setting, State, View

HISTORY = 8
_ORDER = tuple(State)


@dataclass(frozen=True, slots=True)
class _Watch:
    """One sign in one layer: the newest finding, and intervals in a row with or without it."""

    finding: Finding
    seen: int = 0
    absent: int = 0
    believed: bool = False


class Doctor:
    """Give it the counts of every interval, in order."""

    def __init__(self, setting: Setting, *, patience: int = 2) -> None:
        self.setting = setting
        self.patience = patience
        self._past: dict[str, tuple[float, ...]] = {}
        self._watches: dict[tuple[str, str], _Watch] = {}

    def examine(self, layers: Sequence[LayerCounts]) -> tuple[Finding, ...]:
        """Return what is believed after this interval, worst first."""
        for layer in layers:
            past = self._past.get(layer.layer, ())
            for sign in SIGNS:
                finding = sign(View(layer, self.setting, past))
                self._update((layer.layer, sign.__name__), finding)
            self._past[layer.layer] = (*past, layer.load_entropy)[-HISTORY:]
        believed = [w.finding for w in self._watches.values() if w.believed]
        return tuple(sorted(believed, key=lambda f: -_ORDER.index(f.state)))

    def _update(self, key: tuple[str, str], finding: Finding | None) -> None:
        watch = self._watches.get(key)
        if finding is not None:
            finding = replace(finding, sign=key[1])
            seen = watch.seen + 1 if watch else 1
            at_once = key[1] == "not_finite"
            believed = at_once or seen >= self.patience or (watch is not None and watch.believed)
            self._watches[key] = _Watch(finding, seen=seen, believed=believed)
        elif watch is not None:
            absent = watch.absent + 1
            if absent >= self.patience or not watch.believed:
                del self._watches[key]
            else:
                self._watches[key] = replace(watch, seen=0, absent=absent)


def state_of(findings: Sequence[Finding], *, layer: str) -> State:
    """Return a layer's worst state."""
    states = [f.state for f in findings if f.layer == layer]
    return max(states, key=_ORDER.index, default=State.OK)


def health(findings: Sequence[Finding]) -> str:
    """Return a few words for a status line: ``healthy``, or the worst finding and how many more."""
    if not findings:
        return "healthy"
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"layer {findings[0].layer} {findings[0].text}{more}"


def report(findings: Sequence[Finding]) -> list[str]:
    """Return one sentence per finding: what, likely cause, what to try."""
    return [finding.sentence for finding in findings]
