"""Health rules of MoE routers: one function per failure, from a layer's usage to a finding.

A rule reads the expert usage of one layer in one interval, and the load entropies of the intervals
before. It returns None where it finds nothing.

Letters: E experts, G languages, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moesaic.core.errors import listed
from moesaic.monitor.expert_usage import LayerUsage
from moesaic.monitor.router_settings import RouterSettings

MIN_EDGES_PER_EXPERT = 16  # with fewer, the load of an expert is mostly chance


class HealthState(StrEnum):
    """Health of a layer's router, mildest first."""

    OK = "ok"
    UNIFORM = "uniform"
    SKEWED = "skewed"
    OVERFLOW = "overflow"
    DEAD = "dead"
    COLLAPSING = "collapsing"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True)
class HealthFinding:
    """A fault of one layer's router with its likely cause and advice.

    ``rule`` is the name of the rule; ``text`` continues "layer X".
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
    """Usage of one layer in one interval, and its earlier load entropies, oldest first."""

    usage: LayerUsage
    settings: RouterSettings
    past_load_entropies: tuple[float, ...] = ()

    @property
    def has_enough_edges(self) -> bool:
        experts = self.usage.num_experts
        return experts > 1 and self.usage.edges >= MIN_EDGES_PER_EXPERT * experts


class _Diagnosis(NamedTuple):
    """``cause`` and ``advice`` are those of weak balancing, unless given."""

    text: str
    cause: str = ""
    advice: str = ""


HealthRule = Callable[[LayerInterval], HealthFinding | None]
HEALTH_RULES: list[HealthRule] = []


def _health_rule(
    state: HealthState, *, any_count: bool = False
) -> Callable[[Callable[[LayerInterval], _Diagnosis | None]], HealthRule]:
    """Add a function to ``HEALTH_RULES``: its diagnosis becomes a finding of this state.

    Without ``any_count`` the rule applies to layers with enough edges alone.
    """

    def add(diagnose: Callable[[LayerInterval], _Diagnosis | None]) -> HealthRule:
        @wraps(diagnose)
        def rule(interval: LayerInterval) -> HealthFinding | None:
            if not (any_count or interval.has_enough_edges):
                return None
            diagnosis = diagnose(interval)
            if diagnosis is None:
                return None
            text, cause, advice = diagnosis
            cause = cause or _balance_cause(interval.settings)
            advice = advice or _balance_advice(interval.settings)
            return HealthFinding(
                interval.usage.layer, diagnose.__name__, state, text, cause, advice
            )

        HEALTH_RULES.append(rule)
        return rule

    return add


@_health_rule(HealthState.UNSTABLE, any_count=True)
def not_finite(interval: LayerInterval) -> _Diagnosis | None:
    """Router entropy or logits are NaN or infinite."""
    scales = (interval.usage.router_entropy, interval.usage.logit_rms)
    if all(s is None or math.isfinite(s) for s in scales):
        return None
    return _Diagnosis(
        "has router values that are not finite",
        cause="an overflow in the layers before it, or a learning rate that is too high",
        advice="resume from the last checkpoint with "
        f"{interval.settings.set_learning_rate(0.5)}, or with a smaller clip_norm",
    )


@_health_rule(HealthState.UNSTABLE, any_count=True)
def exploding_logits(interval: LayerInterval) -> _Diagnosis | None:
    """Router logits are so large that rounding decides (ST-MoE, arXiv:2202.08906)."""
    scale = interval.usage.logit_rms
    if scale is None or not 30 < scale < math.inf:
        return None
    settings = interval.settings
    return _Diagnosis(
        f"has router logits of size {scale:.0f}",
        cause="there is no z-loss" if settings.z_weight == 0 else "the z-loss is too weak",
        advice=settings.strengthen_z_loss(),
    )


@_health_rule(HealthState.DEAD, any_count=True)
def no_tokens(interval: LayerInterval) -> _Diagnosis | None:
    """The layer receives no tokens."""
    if interval.usage.edges:
        return None
    return _Diagnosis(
        "received no tokens",
        cause="the data has no rows for this side of the model",
        advice="check data.mixture.tasks, data.loader.max_source and data.loader.max_target",
    )


@_health_rule(HealthState.COLLAPSING)
def collapsed(interval: LayerInterval) -> _Diagnosis | None:
    """A few experts receive nearly all edges (routing collapse)."""
    usage, k = interval.usage, interval.settings.top_k
    experts = usage.computing_load.size
    few = min(max(1.25 * k, experts / 3), 0.7 * experts)
    if not usage.mean_load or usage.effective_experts > few or mostly_null_experts(interval):
        return None
    order = np.argsort(-usage.computing_load, kind="stable")
    share = np.cumsum(usage.computing_load[order]) / usage.computing_load.sum()
    used = int(np.searchsorted(share, 0.9)) + 1
    names = _list_experts(sorted(order[:used].tolist()))
    takes = "takes" if used == 1 else "take"
    return _Diagnosis(
        f"collapsed to {used}/{experts} experts ({names} {takes} "
        f"{share[used - 1]:.0%} of the edges)",
    )


@_health_rule(HealthState.COLLAPSING)
def entropy_falling(interval: LayerInterval) -> _Diagnosis | None:
    """The load entropy falls in every interval: the start of a collapse."""
    trail = [*interval.past_load_entropies, interval.usage.load_entropy][-5:]
    steady = len(trail) == 5 and all(a > b for a, b in pairwise(trail))
    if not steady or trail[0] - trail[-1] < 0.1:
        return None
    return _Diagnosis(
        f"is losing experts: load entropy fell from {trail[0]:.2f} to {trail[-1]:.2f}",
    )


@_health_rule(HealthState.UNSTABLE)
def saturated_router(interval: LayerInterval) -> _Diagnosis | None:
    """Router probabilities are saturated, so the router's gradient vanishes."""
    entropy, settings = interval.usage.router_entropy, interval.settings
    if entropy is None or not entropy < 0.02:
        return None
    return _Diagnosis(
        f"has a saturated router (entropy {entropy:.3f} of 1)",
        cause="logits grew until the softmax is one-hot, and no gradient is left",
        advice=f"{settings.strengthen_z_loss()}, {settings.set_moe('noise', 'Jitter()')}, or "
        f"{settings.set_router_learning_rate(1 / 3)}",
    )


@_health_rule(HealthState.DEAD)
def dead_experts(interval: LayerInterval) -> _Diagnosis | None:
    """Some experts receive no token."""
    working = interval.usage.computing_load
    dead = np.flatnonzero(working == 0).tolist()
    if not dead or collapsed(interval) or mostly_null_experts(interval):
        return None
    return _Diagnosis(
        f"has {len(dead)}/{working.size} experts without a token ({_list_experts(dead)})",
        advice=f"{_balance_advice(interval.settings)}, or fewer {interval.settings.moe}.experts",
    )


@_health_rule(HealthState.COLLAPSING)
def mostly_null_experts(interval: LayerInterval) -> _Diagnosis | None:
    """Nearly all edges go to null experts."""
    usage = interval.usage
    if usage.null_expert_frac <= 0.9:
        return None
    return _Diagnosis(
        f"sends {usage.null_expert_frac:.0%} of its edges to null experts",
        cause="null experts cost nothing early in training, so the router settles on them before "
        "the other experts have learned anything",
        advice=f"a smaller {interval.settings.moe}.null_experts.number, or a balance loss over all "
        f"experts: {_balance_advice(interval.settings)}",
    )


@_health_rule(HealthState.OVERFLOW)
def capacity_overflow(interval: LayerInterval) -> _Diagnosis | None:
    """Expert capacity drops many edges."""
    usage, factor = interval.usage, interval.settings.capacity_factor
    if usage.drop_frac <= 0.05:
        return None
    uneven = usage.load_entropy < 0.97
    return _Diagnosis(
        f"drops {usage.drop_frac:.0%} of its edges",
        cause="the load is uneven: some experts are full while others are not"
        if uneven
        else f"capacity factor {factor} is too small even for a balanced load",
        advice="" if uneven else interval.settings.enlarge_capacity(),
    )


@_health_rule(HealthState.OVERFLOW, any_count=True)
def late_drops(interval: LayerInterval) -> _Diagnosis | None:
    """The dropped edges are mostly those of late tokens (OpenMoE, arXiv:2402.01739)."""
    usage = interval.usage
    dropped = int(usage.dropped.sum())
    few = dropped < MIN_EDGES_PER_EXPERT or usage.drop_frac <= 0.01
    if few or usage.dropped_late <= 0.8 * dropped:
        return None
    return _Diagnosis(
        f"drops late tokens: {usage.dropped_late / dropped:.0%} of its drops are in the later "
        "half of the queue",
        cause="drop priority is by position, first come first served",
        advice=interval.settings.set_moe("limit.priority", "RandomPriority()"),
    )


@_health_rule(HealthState.OVERFLOW)
def language_drops(interval: LayerInterval) -> _Diagnosis | None:
    """One language has most of the dropped edges."""
    usage = interval.usage
    requested = usage.counts.sum(0) + usage.dropped
    share = usage.dropped / np.maximum(requested, 1)
    share = np.where(requested >= 2 * MIN_EDGES_PER_EXPERT, share, 0.0)
    if not share.size:
        return None
    worst = int(share.argmax())
    others = (usage.dropped.sum() - usage.dropped[worst]) / max(
        requested.sum() - requested[worst], 1
    )
    if share[worst] <= max(0.05, 3 * others):
        return None
    return _Diagnosis(
        f"drops {share[worst]:.0%} of {interval.settings.languages[worst]}, "
        f"{others:.0%} of the others",
        cause="its tokens go to few experts, which are full",
        advice=f"{interval.settings.enlarge_capacity()}, {_balance_advice(interval.settings)}, or "
        "a larger data.loader.batch_tokens, with more rows of other languages in each batch",
    )


@_health_rule(HealthState.SKEWED)
def language_monopoly(interval: LayerInterval) -> _Diagnosis | None:
    """One language fills an overloaded expert that other languages do not use."""
    usage = interval.usage
    edges = usage.counts.sum(0)
    if (edges > 0).sum() < 3 or collapsed(interval):
        return None
    of_language = interval.settings.top_k * usage.counts / np.maximum(edges, 1)
    of_expert = usage.counts / np.maximum(usage.load[:, None], 1)
    hit = (of_language > 0.8) & (of_expert > 0.9) & (usage.load[:, None] > 1.25 * usage.mean_load)
    hit[usage.computing_load.size :] = False
    if not hit.any():
        return None
    expert, language = (int(i) for i in np.argwhere(hit)[0])
    name = interval.settings.languages[language]
    sent = usage.counts[expert, language] / edges[language]
    return _Diagnosis(
        f"has expert {expert} taken over by {name}: it sends {sent:.0%} of its edges there and is "
        f"{of_expert[expert, language]:.0%} of the expert's load, "
        f"{usage.load[expert] / usage.mean_load:.1f} times the mean",
        cause="the router depends on the language tag alone, and the language is frequent",
        advice=f"a higher data.mixture.temperature, or {_balance_advice(interval.settings)}; no "
        "fault if intended",
    )


@_health_rule(HealthState.SKEWED)
def uneven_load(interval: LayerInterval) -> _Diagnosis | None:
    """Expert loads are far apart, without dead experts or a collapse."""
    usage = interval.usage
    most_possible = usage.computing_load.size / interval.settings.top_k - 1
    hot = usage.max_vio > min(2.0, 0.75 * most_possible)
    if not usage.mean_load or not (hot or usage.min_load < 0.1):
        return None
    if any(r(interval) for r in (dead_experts, collapsed, language_monopoly, mostly_null_experts)):
        return None
    most, least = int(usage.computing_load.argmax()), int(usage.computing_load.argmin())
    return _Diagnosis(
        f"is uneven: expert {most} has {usage.max_vio + 1:.1f} times the mean load, "
        f"expert {least} {usage.min_load:.2f}",
    )


@_health_rule(HealthState.UNIFORM)
def uniform_router(interval: LayerInterval) -> _Diagnosis | None:
    """Router probabilities are uniform, long after the start."""
    entropy = interval.usage.router_entropy
    if len(interval.past_load_entropies) < 5 or entropy is None or not entropy > 0.98:
        return None
    settings = interval.settings
    strong = settings.balance_weight > 0.05
    return _Diagnosis(
        f"prefers no expert: router entropy is {entropy:.2f} of 1",
        cause=f"balance weight {settings.balance_weight:g} outweighs the task"
        if strong
        else "the router hardly learns",
        advice=settings.set_balance_weight(0.01)
        if strong
        else settings.set_router_learning_rate(3.0),
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
        return f"{settings.set_bias_rate(3 * settings.bias_rate)}, or patience early in a run"
    if settings.balance_weight == 0:
        return settings.add_balance_term("SwitchBalance(weight=0.01)")
    return f"{settings.set_balance_weight(3 * settings.balance_weight)} or a longer schedule.warmup"


def _list_experts(experts: list[int]) -> str:
    return listed(map(str, experts), most=6)
