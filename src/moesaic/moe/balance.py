"""Balance: loss terms that keep experts evenly used and logits small; returned, never stored.

A term is this rank's share (see ``ranks.py``): local sums over global counts. The loss of a step is
the mean over its micro-batches.

Letters: T tokens of this rank, E experts.

SequenceBalance: experts used evenly within each row.

Letters: T tokens of this rank, E experts.

GlobalBatchBalance and MicroBatchBalance: over which tokens the load is to be even.

Letters: E experts, R ranks.

DeviceBalance: groups of experts used evenly, whatever happens within a group.

Letters: E experts, D groups.

Importance: the variation of what experts weigh, over a whole batch.

Letters: E experts.

MutualInformationBalance: experts evenly used over all tokens, each token sure of a few.

Letters: T tokens of this rank, E experts.

EntropyBalance: routers that are sure of themselves, so that few experts pass a threshold.

Letters: T tokens, E experts.

TargetLoadBalance: the share of tokens that pass a bar, held at a target.

Letters: E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.limit import Limit
from moesaic.moe.router_context import RouterContext, RuleState, StatefulRule
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class BalanceInputs:
    """What a balance term may look at.

    ``routing`` is as selected, before any limit; ``probabilities`` are the select's own.
    ``load`` (edges per expert) and ``tokens`` are summed over all ranks that share the batch;
    ``heard`` is what earlier micro-batches of the same optimizer step had as ``load``.
    ``gate.state`` is the term's own state. ``ranks`` serve a term that adds up something else.
    """

    router: RouterContext
    routing: Routing
    probabilities: Float[Tensor, "T E"]
    load: Float[Tensor, "E"]
    accumulated_load: Float[Tensor, "E"]
    num_tokens: Float[Tensor, ""]
    batch_group: BatchGroup

    @property
    def logits(self) -> Float[Tensor, "T E"]:
        return self.router.logits

    def zero(self) -> Float[Tensor, ""]:
        """Return the share of a rank that has nothing to say; a gradient may pass through it."""
        return 0.0 * self.router.logits.sum()


class Balance(Choice, StatefulRule):
    """Family of balance terms. ``name`` is its key in ``RoutingRecord.losses``."""

    name: ClassVar[str] = "balance"

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        """Return this rank's share of the weighted term."""
        raise NotImplementedError

    def selection_bias(self, state: RuleState) -> Float[Tensor, "E"] | None:
        """Return what is added to scores when experts are chosen (never to weights)."""
        del state
        return None

    def balancing_weight(self) -> float:
        """Return the weight with which the loss evens the experts' load; 0 if it does not."""
        return 0.0

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        """Return what the term expects of a layer with so many working experts, if not this."""
        del experts, limit
        return None


class SwitchBalance(Balance):
    """``weight * E * sum_e f_e p_e`` (2101.03961, equations 4 to 6): ``weight`` when balanced.

    f_e is the fraction of edges that chose expert e before any drop, p_e its mean probability.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.load)

    def balancing_weight(self) -> float:
        return self.weight


class RouterZLoss(Balance):
    """``weight * mean over tokens of logsumexp(logits)^2`` (ST-MoE, 2202.08906, equation 5)."""

    name: ClassVar[str] = "z"
    weight: float = 0.001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        square = inputs.logits.logsumexp(-1).square().sum()
        return self.weight * square / inputs.num_tokens.clamp(min=1).float()


def load_balance_loss(inputs: BalanceInputs, *, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return this rank's share of ``E * sum_e f_e p_e``, f being the fractions of ``load``."""
    fraction = (load / load.sum().clamp(min=1)).float()
    mean = inputs.probabilities.sum(0) / inputs.num_tokens.clamp(min=1).float()
    return load.numel() * torch.dot(fraction, mean)


class SequenceBalance(Balance):
    """``weight * mean over rows of sum_e f_e P_e`` (DeepSeek-V3, 2412.19437, equations 17 to 20).

    Within a row of t tokens, f_e is E times the fraction of its edges that chose expert e, and P_e
    its mean probability; ``weight`` when every row is balanced. Rows count alike whatever their
    length, and the mean is over the rows of all ranks, of which several may hold tokens of one (its
    key tells). The paper counts the experts of highest affinity, bias left out; here the edges that
    were chosen count, with a ``BiasUpdate`` too.
    """

    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing, probabilities = inputs.routing, inputs.probabilities
        count, place = _global_rows(inputs)
        experts = probabilities.shape[1]
        edge = place[routing.token] * (experts + 1) + routing.expert  # lost edges come last
        chosen = torch.bincount(edge, minlength=count * (experts + 1)).view(count, experts + 1)
        tokens = torch.bincount(place, minlength=count)
        chosen, tokens = inputs.batch_group.sum(
            torch.cat([chosen[:, :experts], tokens[:, None]], 1).double()
        ).split([experts, 1], 1)
        fraction = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).float()
        mean = probabilities.new_zeros(count, experts).index_add(0, place, probabilities) / tokens
        return self.weight * experts * (fraction * mean.float()).sum() / max(count, 1)

    def balancing_weight(self) -> float:
        return self.weight


def _global_rows(inputs: BalanceInputs) -> tuple[int, Int[Tensor, "T"]]:
    """Return how many rows all ranks hold tokens of, and which of them each token here is of."""
    context = inputs.router.context
    named = torch.stack([context.row_key, context.row], 1)
    own, place = named.unique(dim=0, return_inverse=True)
    held = inputs.batch_group.gather(own)
    every, number = held.rows.unique(dim=0, return_inverse=True)
    return every.shape[0], number[held.start + place]


class GlobalBatchBalance(Balance):
    """``weight * E * sum_e f_e p_e``, f over the optimizer step so far (2501.11873, section 3).

    f_e is the fraction of edges that chose expert e on all ranks and in all micro-batches of the
    step up to this one (the paper's buffer); p_e is that of this micro-batch. A row of one domain
    may then use few experts as long as the step uses all. In the last micro-batch f is exactly that
    of one large batch. Without accumulation this is ``SwitchBalance``, whose f is that of all ranks
    already.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.accumulated_load + inputs.load)

    def balancing_weight(self) -> float:
        return self.weight


class MicroBatchBalance(Balance):
    """The mean over ranks of each rank's own Switch loss: what 2501.11873 compares with.

    Every rank is to use all experts on its own part of a micro-batch, so the loss depends on how
    the batch is shared out, on purpose. Ranks without a token do not count.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens = inputs.routing.num_tokens
        busy = inputs.batch_group.sum(inputs.num_tokens.new_full((1,), float(tokens > 0)))
        load = inputs.routing.load()
        fraction = (load / load.sum().clamp(min=1)).float()
        mean = inputs.probabilities.sum(0) / max(tokens, 1)
        own = self.weight * load.numel() * torch.dot(fraction, mean)
        return own / busy[0].clamp(min=1).float()

    def balancing_weight(self) -> float:
        return self.weight


class DeviceBalance(Balance):
    """``weight * sum_i f'_i P'_i`` over ``groups`` of experts (2401.06066, equations 15 to 17).

    f'_i is the mean over the group's experts of E times the fraction of edges that chose them, P'_i
    the sum of their mean probabilities; ``weight`` when groups are balanced. Groups are of
    neighbours, as they would be placed on devices; spare experts, which are nowhere, are in none.
    """

    weight: float = 0.05
    num_groups: int = Field(default=2, ge=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        working = inputs.load.numel() - inputs.router.num_null_experts
        share = inputs.load[:working] / inputs.load.sum().clamp(min=1)
        used = inputs.load.numel() * share.float().view(self.num_groups, -1).mean(1)
        mean = inputs.probabilities[:, :working].sum(0) / inputs.num_tokens.clamp(min=1).float()
        return self.weight * torch.dot(used, mean.view(self.num_groups, -1).sum(1))

    def balancing_weight(self) -> float:
        return self.weight

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        del limit
        if experts % self.num_groups == 0:
            return None
        return f"groups to divide the experts, not {self.num_groups} groups of {experts}"


class ImportanceBalance(Balance):
    """``weight * CV(importance)^2`` (1701.06538, equations 6 and 7).

    The importance of an expert is the sum of its weights (G(x)) over the tokens of the batch, on
    all ranks, before any limit; CV^2 is its variance over experts divided by its squared mean: 0
    when balanced, E - 1 when collapsed. The load term beside it in the paper belongs to that
    paper's noisy gating and is not here.
    """

    weight: float = 0.1

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing = inputs.routing
        zero = inputs.logits.new_zeros(inputs.load.numel() + 1)
        own = zero.index_add(0, routing.expert, routing.weight)[:-1]
        whole = inputs.batch_group.sum(own.detach().double()).requires_grad_()
        with torch.enable_grad():
            value = self.weight * squared_coefficient_of_variation(whole)
            (slope,) = torch.autograd.grad(value, whole)
        # not linear in the sums of ranks: each rank has a part of the value by its tokens, and of
        # the gradient what the whole's slope says of its own sums
        moved = torch.dot(slope.float(), own)
        part = routing.num_tokens / inputs.num_tokens.clamp(min=1)
        return moved - moved.detach() + (value.detach() * part).float()

    def balancing_weight(self) -> float:
        return self.weight


def squared_coefficient_of_variation(x: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation, 0 for zeros."""
    mean = x.mean()
    return x.var(correction=0) / mean.square().clamp(min=torch.finfo(x.dtype).tiny)


class MutualInformationBalance(Balance):
    """``weight * (mean over tokens of H(e | x) - H(e))``, natural logs (DS-MoE, 2404.05567).

    Minus the mutual information of tokens and experts: between ``-weight * log E`` and 0. H(e) is
    the entropy of the mean probabilities m of the whole batch, over all ranks. A rank's share of
    ``-H(e) = sum_e m_e log m_e`` is the same sum with its own part of m before the logarithm, which
    is a constant: probabilities sum to one, so the logarithm's own gradient is zero, and both
    values and gradients of the shares add up to those of the batch.
    """

    name: ClassVar[str] = "mutual_information"
    weight: float = Field(default=0.0005, ge=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens = inputs.num_tokens.clamp(min=1).float()
        p = inputs.probabilities
        mean = inputs.batch_group.sum(p.detach().double().sum(0)).float() / tokens
        # one sum: the difference of two large ones would be rounded away
        return self.weight * (p * (_clamped_log(mean) - _clamped_log(p))).sum() / tokens

    def balancing_weight(self) -> float:
        return self.weight


def _clamped_log(p: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Natural logarithm, large and finite at zero (0 log 0 is 0)."""
    return p.clamp(min=1e-30).log()


class EntropyBalance(Balance):
    """``weight * mean over tokens of the probabilities' entropy``: top-p's dynamic loss.

    Harder tasks need more experts (2403.07652): without it a top-p router spreads its mass and
    takes ever more experts. It evens nothing.
    """

    name: ClassVar[str] = "entropy"
    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        p = inputs.probabilities
        log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return -self.weight * (p * log).sum() / inputs.num_tokens.clamp(min=1).float()


class TargetLoadBalance(Balance):
    """``weight * mean over experts of (f_e - target)^2``, for ``Threshold``. Ours.

    f_e is the fraction of tokens that expert e has an edge to. A count has no gradient: that of the
    mean sigmoid score stands in for it (a straight-through estimate), so all tokens' scores move up
    when too few pass, and down when too many do. MoDification (2410.14268) says no more than that a
    threshold takes the place of a top-k.
    """

    name: ClassVar[str] = "kept"
    target: float = Field(default=0.5, gt=0, lt=1)
    weight: float = Field(default=1.0, ge=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens, score = inputs.num_tokens.clamp(min=1), inputs.logits.sigmoid()
        miss = (inputs.load / tokens - self.target).float()
        own = score.shape[0] / tokens.float()
        moved = (score - score.detach()).sum(0) / tokens.float()  # zero, but for its gradient
        return self.weight * (own * miss.square() + 2 * miss * moved).mean()
