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

from moesaic.monitor.expert_usage import LayerUsage

MIN_EDGES_PER_EXPERT = 16  # edges per expert, below which a share of them says little


class HealthState(StrEnum):
    """Health of a layer, mildest first."""

    OK = "ok"
    UNIFORM = "uniform"
    SKEWED = "skewed"
    OVERFLOW = "overflow"
    DEAD = "dead"
    COLLAPSING = "collapsing"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True)
class RouterSettings:
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
class HealthFinding:
    """What is wrong with one layer, why (probably), and what to try; plain words.

    ``sign`` names the rule; ``text`` reads on after "layer X".
    """

    layer: str
    rule: str
    state: HealthState
    text: str
    cause: str
    advice: str

    @property
    def sentence(self) -> str:
        return f"layer {self.layer} {self.text}; likely cause: {self.cause}; try: {self.advice}"


@dataclass(frozen=True, slots=True)
class LayerInterval:
    """One interval of one layer. ``past`` holds earlier load entropies, oldest first."""

    counts: LayerUsage
    settings: RouterSettings
    past_load_entropies: tuple[float, ...] = ()

    @property
    def has_enough_edges(self) -> bool:
        return (
            self.counts.edges >= MIN_EDGES_PER_EXPERT * self.counts.num_experts
            and self.counts.num_experts > 1
        )

    def make_finding(
        self, state: HealthState, text: str, *, cause: str, advice: str
    ) -> HealthFinding:
        """Make a finding; its sign is filled in by the table ``HEALTH_RULES``."""
        return HealthFinding(self.counts.layer, "", state, text, cause, advice)


def not_finite(layer: LayerInterval) -> HealthFinding | None:
    """The router's own numbers are NaN or infinite."""
    scales = (layer.counts.router_entropy, layer.counts.logit_rms)
    if all(s is None or math.isfinite(s) for s in scales):
        return None
    return layer.make_finding(
        HealthState.UNSTABLE,
        "has router values that are not finite",
        cause="an overflow in the layers before it, or a learning rate that is too high",
        advice="go back to the last checkpoint with a lower learning rate; check clip_norm",
    )


def exploding_logits(layer: LayerInterval) -> HealthFinding | None:
    """Logits so large that rounding decides (ST-MoE, arXiv:2202.08906)."""
    scale = layer.counts.logit_rms
    if scale is None or not 30 < scale < math.inf:
        return None
    none = layer.settings.z_weight == 0
    return layer.make_finding(
        HealthState.UNSTABLE,
        f"has router logits of size {scale:.0f}",
        cause="no z-loss holds them back" if none else "the z-loss is too weak",
        advice="RouterZLoss(weight=0.001)"
        if none
        else f"a z-loss above {layer.settings.z_weight:g}",
    )


def no_tokens(layer: LayerInterval) -> HealthFinding | None:
    """Nothing arrives at the layer."""
    if layer.counts.edges:
        return None
    return layer.make_finding(
        HealthState.DEAD,
        "received no tokens",
        cause="the data has no rows for this side of the model",
        advice="look at the mixture's tasks and at the length limits",
    )


def collapsed(layer: LayerInterval) -> HealthFinding | None:
    """A few experts do all the work."""
    counts, k = layer.counts, layer.settings.top_k
    experts = counts.computing_load.size
    few = min(max(1.25 * k, experts / 3), 0.7 * experts)
    if (
        not layer.has_enough_edges
        or not counts.mean_load
        or counts.effective_experts > few
        or mostly_null_experts(layer)
    ):
        return None
    order = np.argsort(-counts.computing_load, kind="stable")
    share = np.cumsum(counts.computing_load[order]) / counts.computing_load.sum()
    used = int(np.searchsorted(share, 0.9)) + 1
    names = _list_experts(sorted(order[:used].tolist()))
    takes = "takes" if used == 1 else "take"
    return layer.make_finding(
        HealthState.COLLAPSING,
        f"collapsed to {used}/{experts} experts ({names} {takes} "
        f"{share[used - 1]:.0%} of the edges)",
        cause=_balance_cause(layer.settings),
        advice=_balance_advice(layer.settings),
    )


def entropy_falling(layer: LayerInterval) -> HealthFinding | None:
    """The load entropy falls interval after interval: a collapse seen coming."""
    trail = [*layer.past_load_entropies, layer.counts.load_entropy][-5:]
    steady = len(trail) == 5 and all(a > b for a, b in pairwise(trail))
    if not layer.has_enough_edges or not steady or trail[0] - trail[-1] < 0.1:
        return None
    return layer.make_finding(
        HealthState.COLLAPSING,
        f"is losing experts: load entropy fell from {trail[0]:.2f} to {trail[-1]:.2f}",
        cause=_balance_cause(layer.settings),
        advice=_balance_advice(layer.settings),
    )


def saturated_router(layer: LayerInterval) -> HealthFinding | None:
    """The router is certain of every token, so it no longer learns."""
    entropy = layer.counts.router_entropy
    if not layer.has_enough_edges or entropy is None or not entropy < 0.02:
        return None
    return layer.make_finding(
        HealthState.UNSTABLE,
        f"has a saturated router (entropy {entropy:.3f} of 1)",
        cause="logits grew until the softmax gives one expert everything, and no gradient is left",
        advice="a z-loss, router noise, or a lower learning rate for the router",
    )


def dead_experts(layer: LayerInterval) -> HealthFinding | None:
    """Some experts get nothing at all."""
    working = layer.counts.computing_load  # a spare expert without a token is no loss
    dead = np.flatnonzero(working == 0).tolist()
    if not layer.has_enough_edges or not dead or collapsed(layer) or mostly_null_experts(layer):
        return None
    return layer.make_finding(
        HealthState.DEAD,
        f"has {len(dead)}/{working.size} experts without a token ({_list_experts(dead)})",
        cause=_balance_cause(layer.settings),
        advice=f"{_balance_advice(layer.settings)}, or fewer experts",
    )


def mostly_null_experts(layer: LayerInterval) -> HealthFinding | None:
    """Nearly every choice is spent on experts that do no work."""
    counts = layer.counts
    if not layer.has_enough_edges or counts.null_expert_frac <= 0.9:
        return None
    return layer.make_finding(
        HealthState.COLLAPSING,
        f"sends {counts.null_expert_frac:.0%} of its edges to experts that do no work",
        cause="idle choices cost nothing early on, so the router settles on them before the "
        "working experts have learned anything",
        advice="fewer spare experts, or a balance loss over all experts "
        f"({_balance_advice(layer.settings)})",
    )


def capacity_overflow(layer: LayerInterval) -> HealthFinding | None:
    """Capacity cuts off a good part of the edges."""
    counts, factor = layer.counts, layer.settings.capacity_factor
    if not layer.has_enough_edges or counts.drop_frac <= 0.05:
        return None
    uneven = counts.load_entropy < 0.97
    return layer.make_finding(
        HealthState.OVERFLOW,
        f"drops {counts.drop_frac:.0%} of its edges",
        cause="the load is uneven, so some experts are full while others idle"
        if uneven
        else f"capacity factor {factor} leaves no room for chance",
        advice=_balance_advice(layer.settings)
        if uneven
        else f"Capacity(factor={max(1.25, 1.5 * (factor or 1.0)):.2f}) or Dropless",
    )


def late_drops(layer: LayerInterval) -> HealthFinding | None:
    """What is dropped is mostly what came late (OpenMoE, arXiv:2402.01739)."""
    counts = layer.counts
    dropped = int(counts.dropped.sum())
    if (
        dropped < MIN_EDGES_PER_EXPERT
        or counts.drop_frac <= 0.01
        or counts.dropped_late <= 0.8 * dropped
    ):
        return None
    return layer.make_finding(
        HealthState.OVERFLOW,
        f"drops late tokens: {counts.dropped_late / dropped:.0%} of its drops are in the later "
        "half of the queue",
        cause="capacity is given by position, first come first served",
        advice="Capacity(priority=RandomPriority) or WeightPriority",
    )


def language_drops(layer: LayerInterval) -> HealthFinding | None:
    """One language pays for the drops."""
    counts = layer.counts
    asked = counts.counts.sum(0) + counts.dropped
    share = counts.dropped / np.maximum(asked, 1)
    share = np.where(asked >= 2 * MIN_EDGES_PER_EXPERT, share, 0.0)
    if not share.size or not layer.has_enough_edges:
        return None
    worst = int(share.argmax())
    others = (counts.dropped.sum() - counts.dropped[worst]) / max(asked.sum() - asked[worst], 1)
    if share[worst] <= max(0.05, 3 * others):
        return None
    return layer.make_finding(
        HealthState.OVERFLOW,
        f"drops {share[worst]:.0%} of {layer.settings.languages[worst]}, {others:.0%} of the others",
        cause="its tokens crowd into few experts, which are full",
        advice="a larger capacity factor, a stronger balance loss, or more rows of other languages "
        "in each batch",
    )


def language_monopoly(layer: LayerInterval) -> HealthFinding | None:
    """A language sits on an overloaded expert that no other language gets into."""
    counts = layer.counts
    own = counts.counts.sum(0)
    if not layer.has_enough_edges or (own > 0).sum() < 3 or collapsed(layer):
        return None
    of_language = layer.settings.top_k * counts.counts / np.maximum(own, 1)
    of_expert = counts.counts / np.maximum(counts.load[:, None], 1)
    hit = (of_language > 0.8) & (of_expert > 0.9) & (counts.load[:, None] > 1.25 * counts.mean_load)
    hit[counts.computing_load.size :] = False
    if not hit.any():
        return None
    expert, language = (int(i) for i in np.argwhere(hit)[0])
    name = layer.settings.languages[language]
    sent = counts.counts[expert, language] / own[language]
    return layer.make_finding(
        HealthState.SKEWED,
        f"has expert {expert} taken over by {name}: it sends {sent:.0%} of its edges there and is "
        f"{of_expert[expert, language]:.0%} of the expert's load, "
        f"{counts.load[expert] / counts.mean_load:.1f} times the mean",
        cause="the router reads little but the language tag, and the language is frequent",
        advice="a higher sampling temperature, or a stronger balance loss; fine if it is meant",
    )


def uneven_load(layer: LayerInterval) -> HealthFinding | None:
    """Loads are far apart, though nobody is out yet."""
    counts = layer.counts
    most_possible = counts.computing_load.size / layer.settings.top_k - 1
    hot = counts.max_vio > min(2.0, 0.75 * most_possible)
    if not layer.has_enough_edges or not counts.mean_load or not (hot or counts.min_load < 0.1):
        return None
    if (
        dead_experts(layer)
        or collapsed(layer)
        or language_monopoly(layer)
        or mostly_null_experts(layer)
    ):
        return None
    most, least = int(counts.computing_load.argmax()), int(counts.computing_load.argmin())
    return layer.make_finding(
        HealthState.SKEWED,
        f"is uneven: expert {most} has {counts.max_vio + 1:.1f} times the mean load, "
        f"expert {least} {counts.min_load:.2f}",
        cause=_balance_cause(layer.settings),
        advice=_balance_advice(layer.settings),
    )


def uniform_router(layer: LayerInterval) -> HealthFinding | None:
    """The router prefers nobody, long after the start: experts are interchangeable."""
    entropy = layer.counts.router_entropy
    if (
        not layer.has_enough_edges
        or len(layer.past_load_entropies) < 5
        or entropy is None
        or not entropy > 0.98
    ):
        return None
    weight = layer.settings.balance_weight
    strong = weight > 0.05
    return layer.make_finding(
        HealthState.UNIFORM,
        f"does not choose: router entropy is {entropy:.2f} of 1",
        cause=f"balance weight {weight:g} outweighs the task"
        if strong
        else "the router hardly learns",
        advice=f"{layer.settings.balance}(weight=0.01)"
        if strong
        else "a higher learning rate for the router",
    )


HealthRule = Callable[[LayerInterval], HealthFinding | None]
HEALTH_RULES: tuple[HealthRule, ...] = (
    not_finite,
    exploding_logits,
    no_tokens,
    collapsed,
    entropy_falling,
    saturated_router,
    dead_experts,
    mostly_null_experts,
    capacity_overflow,
    late_drops,
    language_drops,
    language_monopoly,
    uneven_load,
    uniform_router,
)


def _balance_cause(settings: RouterSettings) -> str:
    if settings.bias_rate:
        return (
            f"the bias moves {settings.bias_rate:g} a step, too slowly for how logits differ so far"
        )
    if settings.balance_weight == 0:
        return "nothing balances the experts: there is no balance loss, or its weight is 0"
    return f"balance weight {settings.balance_weight:g} is too weak for this learning rate"


def _balance_advice(settings: RouterSettings) -> str:
    if settings.bias_rate:
        return f"BiasUpdate(rate={3 * settings.bias_rate:g}), or patience early in a run"
    if settings.balance_weight == 0:
        return "SwitchBalance(weight=0.01) or BiasUpdate(rate=0.001)"
    return f"{settings.balance}(weight={3 * settings.balance_weight:g}) or a longer warm-up"


def _list_experts(experts: list[int]) -> str:
    shown = [str(e) for e in experts[:6]]
    return ", ".join(shown) + (f" and {len(experts) - 6} more" if len(experts) > 6 else "")
