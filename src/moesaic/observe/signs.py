"""Signs: one small function per way that routing goes wrong, from a layer's counts to a finding.

Each looks at one interval of one layer, and at the load entropies of the intervals before. It
returns None where it sees nothing or where there are too few edges to tell.

Letters: E experts, G languages, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from moesaic.observe.layer_counts import LayerCounts

ENOUGH = 16  # edges per expert, below which a share of them says little


class State(StrEnum):
    """Health of a layer, mildest first."""

    OK = "ok"
    UNIFORM = "uniform"
    SKEWED = "skewed"
    OVERFLOW = "overflow"
    DEAD = "dead"
    COLLAPSING = "collapsing"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True)
class Setting:
    """What the run's config says, as far as causes and advice need it.

    ``balance_weight`` and ``z_weight`` are 0 where there is no such loss, ``bias_rate`` where no
    ``BiasUpdate`` balances; ``balance`` is the (strongest) balance loss, by name.
    ``capacity_factor`` is None for dropless routing.
    """

    languages: tuple[str, ...]
    top_k: int = 1
    balance_weight: float = 0.0
    z_weight: float = 0.0
    capacity_factor: float | None = None
    bias_rate: float = 0.0
    balance: str = "SwitchBalance"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one layer, why (probably), and what to try; plain words.

    ``sign`` names the rule; ``text`` reads on after "layer X".
    """

    layer: str
    sign: str
    state: State
    text: str
    cause: str
    advice: str

    @property
    def sentence(self) -> str:
        return f"layer {self.layer} {self.text}; likely cause: {self.cause}; try: {self.advice}"


@dataclass(frozen=True, slots=True)
class View:
    """One interval of one layer. ``past`` holds earlier load entropies, oldest first."""

    counts: LayerCounts
    setting: Setting
    past: tuple[float, ...] = ()

    @property
    def enough(self) -> bool:
        return self.counts.edges >= ENOUGH * self.counts.num_experts and self.counts.num_experts > 1

    def found(self, state: State, text: str, *, cause: str, advice: str) -> Finding:
        """Make a finding; its sign is filled in by the table ``SIGNS``."""
        return Finding(self.counts.layer, "", state, text, cause, advice)


def not_finite(view: View) -> Finding | None:
    """The router's own numbers are NaN or infinite."""
    scales = (view.counts.router_entropy, view.counts.logit_rms)
    if all(s is None or math.isfinite(s) for s in scales):
        return None
    return view.found(
        State.UNSTABLE,
        "has router values that are not finite",
        cause="an overflow in the layers before it, or a learning rate that is too high",
        advice="go back to the last checkpoint with a lower learning rate; check clip_norm",
    )


def exploding_logits(view: View) -> Finding | None:
    """Logits so large that rounding decides (ST-MoE, arXiv:2202.08906)."""
    scale = view.counts.logit_rms
    if scale is None or not 30 < scale < math.inf:
        return None
    none = view.setting.z_weight == 0
    return view.found(
        State.UNSTABLE,
        f"has router logits of size {scale:.0f}",
        cause="no z-loss holds them back" if none else "the z-loss is too weak",
        advice="RouterZ(weight=0.001)" if none else f"a z-loss above {view.setting.z_weight:g}",
    )


def no_tokens(view: View) -> Finding | None:
    """Nothing arrives at the layer."""
    if view.counts.edges:
        return None
    return view.found(
        State.DEAD,
        "received no tokens",
        cause="the data has no rows for this side of the model",
        advice="look at the mixture's tasks and at the length limits",
    )


def collapsed(view: View) -> Finding | None:
    """A few experts do all the work."""
    counts, k = view.counts, view.setting.top_k
    few = min(max(1.25 * k, counts.num_experts / 3), 0.7 * counts.num_experts)
    if not view.enough or not counts.fair or counts.effective_experts > few:
        return None
    order = np.argsort(-counts.load, kind="stable")
    share = np.cumsum(counts.load[order]) / counts.load.sum()
    used = int(np.searchsorted(share, 0.9)) + 1
    names = _listed(sorted(order[:used].tolist()))
    takes = "takes" if used == 1 else "take"
    return view.found(
        State.COLLAPSING,
        f"collapsed to {used}/{counts.num_experts} experts ({names} {takes} "
        f"{share[used - 1]:.0%} of the edges)",
        cause=_balance_cause(view.setting),
        advice=_balance_advice(view.setting),
    )


def falling(view: View) -> Finding | None:
    """The load entropy falls interval after interval: a collapse seen coming."""
    trail = [*view.past, view.counts.load_entropy][-5:]
    steady = len(trail) == 5 and all(a > b for a, b in pairwise(trail))
    if not view.enough or not steady or trail[0] - trail[-1] < 0.1:
        return None
    return view.found(
        State.COLLAPSING,
        f"is losing experts: load entropy fell from {trail[0]:.2f} to {trail[-1]:.2f}",
        cause=_balance_cause(view.setting),
        advice=_balance_advice(view.setting),
    )


def saturated(view: View) -> Finding | None:
    """The router is certain of every token, so it no longer learns."""
    entropy = view.counts.router_entropy
    if not view.enough or entropy is None or not entropy < 0.02:
        return None
    return view.found(
        State.UNSTABLE,
        f"has a saturated router (entropy {entropy:.3f} of 1)",
        cause="logits grew until the softmax gives one expert everything, and no gradient is left",
        advice="a z-loss, router noise, or a lower learning rate for the router",
    )


def dead_experts(view: View) -> Finding | None:
    """Some experts get nothing at all."""
    dead = np.flatnonzero(view.counts.load == 0).tolist()
    if not view.enough or not dead or collapsed(view):
        return None
    return view.found(
        State.DEAD,
        f"has {len(dead)}/{view.counts.num_experts} experts without a token ({_listed(dead)})",
        cause=_balance_cause(view.setting),
        advice=f"{_balance_advice(view.setting)}, or fewer experts",
    )


def overflow(view: View) -> Finding | None:
    """Capacity cuts off a good part of the edges."""
    counts, factor = view.counts, view.setting.capacity_factor
    if not view.enough or counts.drop_frac <= 0.05:
        return None
    uneven = counts.load_entropy < 0.97
    return view.found(
        State.OVERFLOW,
        f"drops {counts.drop_frac:.0%} of its edges",
        cause="the load is uneven, so some experts are full while others idle"
        if uneven
        else f"capacity factor {factor} leaves no room for chance",
        advice=_balance_advice(view.setting)
        if uneven
        else f"Capacity(factor={max(1.25, 1.5 * (factor or 1.0)):.2f}) or Dropless",
    )


def late_drops(view: View) -> Finding | None:
    """What is dropped is mostly the later part of the batch."""
    counts = view.counts
    dropped = int(counts.dropped.sum())
    if dropped < ENOUGH or counts.drop_frac <= 0.01 or counts.dropped_late <= 0.8 * dropped:
        return None
    return view.found(
        State.OVERFLOW,
        f"drops late tokens: {counts.dropped_late / dropped:.0%} of its drops are in the later "
        "half of the batch",
        cause="capacity is given by position, first come first served",
        advice="Capacity(priority=AtRandom) or ByWeight",
    )


def language_drops(view: View) -> Finding | None:
    """One language pays for the drops."""
    counts = view.counts
    asked = counts.counts.sum(0) + counts.dropped
    share = counts.dropped / np.maximum(asked, 1)
    share = np.where(asked >= 2 * ENOUGH, share, 0.0)
    if not share.size or not view.enough:
        return None
    worst = int(share.argmax())
    others = (counts.dropped.sum() - counts.dropped[worst]) / max(asked.sum() - asked[worst], 1)
    if share[worst] <= max(0.05, 3 * others):
        return None
    return view.found(
        State.OVERFLOW,
        f"drops {share[worst]:.0%} of {view.setting.languages[worst]}, {others:.0%} of the others",
        cause="its tokens crowd into few experts, which are full",
        advice="a larger capacity factor, a stronger balance loss, or more rows of other languages "
        "in each batch",
    )


def monopoly(view: View) -> Finding | None:
    """A language sits on an overloaded expert that no other language gets into."""
    counts = view.counts
    own = counts.counts.sum(0)
    if not view.enough or (own > 0).sum() < 3 or collapsed(view):
        return None
    of_language = view.setting.top_k * counts.counts / np.maximum(own, 1)
    of_expert = counts.counts / np.maximum(counts.load[:, None], 1)
    hit = (of_language > 0.8) & (of_expert > 0.9) & (counts.load[:, None] > 1.25 * counts.fair)
    if not hit.any():
        return None
    expert, language = (int(i) for i in np.argwhere(hit)[0])
    name = view.setting.languages[language]
    sent = counts.counts[expert, language] / own[language]
    return view.found(
        State.SKEWED,
        f"has expert {expert} taken over by {name}: it sends {sent:.0%} of its edges there and is "
        f"{of_expert[expert, language]:.0%} of the expert's load, "
        f"{counts.load[expert] / counts.fair:.1f} times the mean",
        cause="the router reads little but the language tag, and the language is frequent",
        advice="a higher sampling temperature, or a stronger balance loss; fine if it is meant",
    )


def skewed(view: View) -> Finding | None:
    """Loads are far apart, though nobody is out yet."""
    counts = view.counts
    most_possible = counts.num_experts / view.setting.top_k - 1
    hot = counts.max_vio > min(2.0, 0.75 * most_possible)
    if not view.enough or not counts.fair or not (hot or counts.min_load < 0.1):
        return None
    if dead_experts(view) or collapsed(view) or monopoly(view):
        return None
    most, least = int(counts.load.argmax()), int(counts.load.argmin())
    return view.found(
        State.SKEWED,
        f"is uneven: expert {most} has {counts.max_vio + 1:.1f} times the mean load, "
        f"expert {least} {counts.min_load:.2f}",
        cause=_balance_cause(view.setting),
        advice=_balance_advice(view.setting),
    )


def uniform(view: View) -> Finding | None:
    """The router prefers nobody, long after the start: experts are interchangeable."""
    entropy = view.counts.router_entropy
    if not view.enough or len(view.past) < 5 or entropy is None or not entropy > 0.98:
        return None
    weight = view.setting.balance_weight
    strong = weight > 0.05
    return view.found(
        State.UNIFORM,
        f"does not choose: router entropy is {entropy:.2f} of 1",
        cause=f"balance weight {weight:g} outweighs the task"
        if strong
        else "the router hardly learns",
        advice=f"{view.setting.balance}(weight=0.01)"
        if strong
        else "a higher learning rate for the router",
    )


Sign = Callable[[View], Finding | None]
SIGNS: tuple[Sign, ...] = (
    not_finite,
    exploding_logits,
    no_tokens,
    collapsed,
    falling,
    saturated,
    dead_experts,
    overflow,
    late_drops,
    language_drops,
    monopoly,
    skewed,
    uniform,
)


def _balance_cause(setting: Setting) -> str:
    if setting.bias_rate:
        return (
            f"the bias moves {setting.bias_rate:g} a step, too slowly for how logits differ so far"
        )
    if setting.balance_weight == 0:
        return "nothing balances the experts: there is no balance loss, or its weight is 0"
    return f"balance weight {setting.balance_weight:g} is too weak for this learning rate"


def _balance_advice(setting: Setting) -> str:
    if setting.bias_rate:
        return f"BiasUpdate(rate={3 * setting.bias_rate:g}), or patience early in a run"
    if setting.balance_weight == 0:
        return "SwitchBalance(weight=0.01) or BiasUpdate(rate=0.001)"
    return f"{setting.balance}(weight={3 * setting.balance_weight:g}) or a longer warm-up"


def _listed(experts: list[int]) -> str:
    shown = [str(e) for e in experts[:6]]
    return ", ".join(shown) + (f" and {len(experts) - 6} more" if len(experts) > 6 else "")
