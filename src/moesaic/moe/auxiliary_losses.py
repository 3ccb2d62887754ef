"""Auxiliary losses of routers: load balancing, and losses on router logits (z-loss, entropy).

A term returns this rank's share (see ``batch_group.py``): local sums over global counts. The loss
of a step is the mean over its micro-batches. The family is ``Balance``; terms with a state are
in ``adaptive_auxiliary_losses.py`` and ``expert_bias.py``.

Letters: T tokens of this rank, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.expert_capacity import Limit
from moesaic.moe.router_context import RouterContext, RuleState, StatefulRule
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class BalanceInputs:
    """The data that a balance term reads.

    ``routing`` holds the edges as selected, before any drop; ``probabilities`` are those of the
    selection rule. ``load`` (edges per expert) and ``num_tokens`` are summed over all ranks of the
    batch; ``accumulated_load`` is the load of the earlier micro-batches of the optimizer step.
    ``router.state`` is the term's own state. ``batch_group`` adds up other values over ranks.
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
        """Return a zero in the autograd graph of the logits."""
        return 0.0 * self.router.logits.sum()


class Balance(Choice, StatefulRule):
    """Family of balance terms. ``name`` is the key in ``RoutingRecord.losses``.

    ``needs_fixed_k`` is true if the term needs the same number of experts for every token.
    """

    name: ClassVar[str] = "balance"
    needs_fixed_k: ClassVar[bool] = False

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        """Return this rank's share of the weighted term."""
        raise NotImplementedError

    def selection_bias(self, _state: RuleState, /) -> Float[Tensor, "E"] | None:
        """Return the bias added to scores when experts are selected, never to weights."""
        return None

    def balancing_weight(self) -> float:
        """Return the weight of the load balancing loss; 0 if the term does not balance load."""
        return 0.0

    def problems(self, _experts: int, _limit: Limit, /) -> str | None:
        """Return what the term expects of a layer with so many true experts, or None."""
        return None


class LoadBalancingLoss:
    """Base of the terms that even the experts' load when their loss is minimised."""

    weight: float

    def balancing_weight(self) -> float:
        return self.weight


class SwitchBalance(LoadBalancingLoss, Balance):
    """``weight * E * sum_e f_e p_e`` (2101.03961, equations 4 to 6): ``weight`` when balanced.

    f_e is the fraction of edges of expert e before any drop, p_e its mean probability.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.load)


class FirstChoiceBalance(LoadBalancingLoss, Balance):
    """``weight * E * sum_e f_e p_e``, f_e being the fraction of tokens whose first choice is e.

    GShard's loss (2006.16668, section 2.2, times E squared) as in fairseq, which trained NLLB-MoE.
    ``SwitchBalance`` counts all choices; of one expert per token both are the same.
    """

    needs_fixed_k: ClassVar[bool] = True
    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing = inputs.routing
        chosen = routing.expert[:: routing.per_token]
        counts = inputs.load.new_zeros(routing.num_experts + 1)
        counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        load = inputs.batch_group.sum(counts)[:-1]
        return self.weight * load_balance_loss(inputs, load=load)


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


class SequenceBalance(LoadBalancingLoss, Balance):
    """``weight * mean over rows of sum_e f_e P_e`` (DeepSeek-V3, 2412.19437, equations 17 to 20).

    Within a row of t tokens, f_e is E times the fraction of its edges that chose expert e, and P_e
    its mean probability; ``weight`` when every row is balanced. The mean gives each row the same
    weight and covers the rows of all ranks, of which several may hold tokens of one row. The paper
    counts the experts of highest affinity without bias; here the selected edges count, with
    ``BiasUpdate`` too.
    """

    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing, probabilities = inputs.routing, inputs.probabilities
        rows, row = inputs.router.context.num_rows, inputs.router.context.row
        experts = probabilities.shape[1]
        edge = row[routing.token] * (experts + 1) + routing.expert  # dropped edges come last
        # not bincount, which waits for a GPU; the last column then counts the tokens
        chosen = probabilities.new_zeros(rows * (experts + 1), dtype=torch.float64)
        chosen = chosen.index_add_(0, edge, torch.ones_like(edge).double()).view(rows, experts + 1)
        own = probabilities.new_zeros(rows, dtype=torch.float64)
        own = own.index_add_(0, row, torch.ones_like(row).double())
        chosen[:, experts] = own
        chosen, tokens = inputs.batch_group.sum_rows(chosen).split([experts, 1], 1)
        tokens = tokens.clamp(min=1)  # a row may have none
        # ranks that share a row count their parts of it
        count = inputs.batch_group.sum((own / tokens[:, 0]).sum(0, keepdim=True)).round()
        fraction = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).float()
        mean = probabilities.new_zeros(rows, experts).index_add(0, row, probabilities) / tokens
        total = (fraction * mean.float()).sum()
        return self.weight * experts * total / count[0].clamp(min=1).float()


class GlobalBatchBalance(LoadBalancingLoss, Balance):
    """``weight * E * sum_e f_e p_e``, f over the optimizer step so far (2501.11873, section 3).

    f_e is the fraction of edges of expert e on all ranks and in all micro-batches of the step up to
    this one (the paper's buffer); p_e is that of this micro-batch. A row of one domain may use few
    experts as long as the step uses all. In the last micro-batch f equals that of one large batch.
    Without gradient accumulation this is ``SwitchBalance``, whose f covers all ranks already.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.accumulated_load + inputs.load)


class MicroBatchBalance(LoadBalancingLoss, Balance):
    """The mean over ranks of each rank's local Switch loss, the baseline of 2501.11873.

    It balances each rank's part of a micro-batch, so the loss depends on the parallel layout, on
    purpose. Ranks without tokens do not count.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens = inputs.routing.num_tokens
        busy = inputs.batch_group.sum(inputs.num_tokens.new_full((1,), float(tokens > 0)))
        load = inputs.routing.load()
        fraction = (load / load.sum().clamp(min=1)).float()
        mean = inputs.probabilities.sum(0) / max(tokens, 1)
        local = self.weight * load.numel() * torch.dot(fraction, mean)
        return local / busy[0].clamp(min=1).float()


class DeviceBalance(LoadBalancingLoss, Balance):
    """``weight * sum_i f'_i P'_i`` over groups of experts (2401.06066, equations 15 to 17).

    f'_i is the mean over the group's experts of E times their fraction of edges, P'_i the sum of
    their mean probabilities; ``weight`` when groups are balanced. Groups are of adjacent experts,
    as they would be placed on devices; null experts are in none.
    """

    weight: float = 0.05
    num_groups: int = Field(default=2, ge=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        true = inputs.load.numel() - inputs.router.num_null_experts
        share = inputs.load[:true] / inputs.load.sum().clamp(min=1)
        used = inputs.load.numel() * share.float().view(self.num_groups, -1).mean(1)
        mean = inputs.probabilities[:, :true].sum(0) / inputs.num_tokens.clamp(min=1).float()
        return self.weight * torch.dot(used, mean.view(self.num_groups, -1).sum(1))

    def problems(self, experts: int, _limit: Limit, /) -> str | None:
        if experts % self.num_groups == 0:
            return None
        return f"groups to divide the experts, not {self.num_groups} groups of {experts}"


class ImportanceBalance(LoadBalancingLoss, Balance):
    """``weight * CV(importance)^2`` (1701.06538, equations 6 and 7).

    The importance of an expert is the sum of its weights G(x) over the tokens of the batch, on all
    ranks, before any drop. CV^2 is its variance over experts divided by its squared mean: 0 when
    balanced, E - 1 when collapsed. The paper's load term belongs to its noisy gating and is not
    implemented.
    """

    weight: float = 0.1

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing = inputs.routing
        zero = inputs.logits.new_zeros(inputs.load.numel() + 1)
        local = zero.index_add(0, routing.expert, routing.weight)[:-1]
        total = inputs.batch_group.sum(local.detach().double()).requires_grad_()
        with torch.enable_grad():
            value = self.weight * squared_coefficient_of_variation(total)
            (slope,) = torch.autograd.grad(value, total)
        # not linear in the sums of ranks: a rank's share of the value is its share of the tokens,
        # and its gradient is the slope of the total at its local sums
        linear = torch.dot(slope.float(), local)
        part = routing.num_tokens / inputs.num_tokens.clamp(min=1)
        return linear - linear.detach() + (value.detach() * part).float()


def squared_coefficient_of_variation(x: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation, 0 for zeros."""
    mean = x.mean()
    return x.var(correction=0) / mean.square().clamp(min=torch.finfo(x.dtype).tiny)


class MutualInformationBalance(LoadBalancingLoss, Balance):
    """``weight * (mean over tokens of H(e | x) - H(e))``, natural logs (DS-MoE, 2404.05567).

    Minus the mutual information of tokens and experts: between ``-weight * log E`` and 0. H(e) is
    the entropy of the mean probabilities m over all ranks. A rank's share of
    ``-H(e) = sum_e m_e log m_e`` is this sum with its local part of m before the logarithm, which
    is a constant: probabilities sum to one, so the gradient of the logarithm adds up to zero, and
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


def _clamped_log(p: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Natural logarithm, large and finite at zero (0 log 0 is 0)."""
    return p.clamp(min=1e-30).log()


class EntropyBalance(Balance):
    """``weight * mean over tokens of the entropy of the probabilities``: top-p's dynamic loss.

    Without it a top-p router flattens its probabilities and selects more and more experts
    (2403.07652). It does not balance load.
    """

    name: ClassVar[str] = "entropy"
    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        p = inputs.probabilities
        log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return -self.weight * (p * log).sum() / inputs.num_tokens.clamp(min=1).float()


class TargetLoadBalance(Balance):
    """``weight * mean over experts of (f_e - target)^2``, for ``Threshold``. Ours.

    f_e is the fraction of tokens with an edge to expert e. A count has no gradient; the gradient of
    the mean sigmoid score replaces it (a straight-through estimate), so all scores rise when too
    few tokens pass the threshold, and fall when too many do. MoDification (2410.14268) only states
    that a threshold replaces a top-k.
    """

    name: ClassVar[str] = "kept"
    target: float = Field(default=0.5, gt=0, lt=1)
    weight: float = Field(default=1.0, ge=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens, score = inputs.num_tokens.clamp(min=1), inputs.logits.sigmoid()
        miss = (inputs.load / tokens - self.target).float()
        share = score.shape[0] / tokens.float()
        surrogate = (score - score.detach()).sum(0) / tokens.float()  # zero with a gradient
        return self.weight * (share * miss.square() + 2 * miss * surrogate).mean()
