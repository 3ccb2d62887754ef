"""Router: router input, gate, noise, selection, capacity limit and balance losses, in float32.

Letters: T tokens, D model dim, E experts (null experts included), S statistics.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.auxiliary_losses import BalanceInputs
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.config import MoE
from moesaic.moe.router_context import RouterContext, RouterState, RoutingStats, TokenContext
from moesaic.moe.router_gate import LayerIndex, RouterShape
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """The routing, this rank's share of each weighted balance term, and the detached logits.

    ``stats_vector`` [4 E + 1] float64 are the statistics of the pass over all ranks (see
    ``RoutingStats``), in training only; ``router_state`` is for the next MoE layer.
    """

    routing: Routing
    losses: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "T E"]
    router_state: RouterState
    stats_vector: Float[Tensor, "S"] | None = None


class Router(nn.Module):
    """Router of an MoE layer: gate, noise, selection, capacity limit and balance losses.

    The state of its rules is in buffers.
    """

    stats_sum: Tensor

    def __init__(self, config: MoE, *, dim: int, layer_index: LayerIndex) -> None:
        super().__init__()
        experts = config.num_router_outputs
        shape = RouterShape(config.router_input.input_dim(dim), experts, layer_index)
        self.gate = config.cross_layer.build_gate(shape)
        self.router_input = config.router_input.build()
        self.config = config
        for owner, rule in config.stateful_rules():
            for name, value in rule.initial_state(experts).items():
                self.register_buffer(f"{owner}_{name}", value)
        stats_sum = torch.zeros(4 * experts + 1, dtype=torch.float64)
        self.register_buffer("stats_sum", stats_sum, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        context: TokenContext,
        router_state: RouterState,
        batch_group: BatchGroup,
    ) -> RouterOutput:
        """Return the routing of ``x``. Collective over ``batch_group``."""
        rules, stats, losses = self.config, None, {}
        with torch.autocast(x.device.type, enabled=False):
            read = self.router_input(x.float(), context=context)
            if self.training:
                read = rules.noise.apply_to_input(read, context)
            gate = self.gate(read, router_state=router_state)
            bias, nulls = self._selection_bias(), rules.null_experts.count()
            router = RouterContext(gate.logits, context, self.training, bias, nulls)
            if self.training:
                noisy = rules.noise.apply_to_logits(router.with_state(self.rule_state("noise")))
                router = replace(router, logits=noisy)
            router = router.with_state(self.rule_state("select"))
            selected = rules.select(router)
            limited = rules.limit(selected, router, batch_group)
            routing = rules.select.renormalise(limited)
            if self.training:
                stats = batch_group.sum(_stats_vector(gate.logits, selected, limited))
                losses = self._losses(router, selected, stats=stats, batch_group=batch_group)
        return RouterOutput(routing, losses, router.logits.detach(), gate.router_state, stats)

    def rule_state(self, rule: str) -> dict[str, Tensor]:
        """Return the tensors of one rule, by name."""
        prefix = f"{rule}_"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._buffers.items()
            if name.startswith(prefix) and tensor is not None
        }

    @torch.no_grad()
    def accumulate_stats(self, stats_vector: Float[Tensor, "S"]) -> None:
        """Add the statistics of a micro-batch to those of the current step."""
        self.stats_sum += stats_vector.to(self.stats_sum.device)

    @torch.no_grad()
    def update_rules(self) -> None:
        """Update the state of all rules after an optimizer step, then reset the statistics."""
        stats = RoutingStats.from_vector(self.stats_sum)
        for owner, rule in self.config.stateful_rules():
            state = self.rule_state(owner)
            for name, value in (rule.update_state(state, stats) if state else {}).items():
                state[name].copy_(value)
        self.reset_stats()

    def reset_stats(self) -> None:
        """Set the statistics of the current step to zero."""
        self.stats_sum.zero_()

    def _selection_bias(self) -> Float[Tensor, "E"] | None:
        terms = [
            term.selection_bias(self.rule_state(f"balance{number}"))
            for number, term in enumerate(self.config.balance)
        ]
        biases = [bias for bias in terms if bias is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _losses(
        self,
        router: RouterContext,
        selected: Routing,
        *,
        stats: Float[Tensor, "S"],
        batch_group: BatchGroup,
    ) -> dict[str, Float[Tensor, ""]]:
        if not self.config.balance:
            return {}
        now, before = RoutingStats.from_vector(stats), RoutingStats.from_vector(self.stats_sum)
        probabilities = self.config.select.probabilities(router)
        losses: dict[str, Float[Tensor, ""]] = {}
        for number, term in enumerate(self.config.balance):
            inputs = BalanceInputs(
                router=router.with_state(self.rule_state(f"balance{number}")),
                routing=selected,
                probabilities=probabilities,
                load=now.load,
                accumulated_load=before.load,
                num_tokens=now.num_tokens,
                batch_group=batch_group,
            )
            zero = router.logits.new_zeros(())
            losses[term.name] = losses.get(term.name, zero) + term(inputs)
        return losses


def _stats_vector(
    logits: Float[Tensor, "T E"], selected: Routing, limited: Routing
) -> Float[Tensor, "S"]:
    """Return this rank's part of the routing statistics (see ``RoutingStats``)."""
    logits = logits.detach().double()
    count = torch.full((1,), logits.shape[0], dtype=torch.float64, device=logits.device)
    loads = [selected.load().double(), limited.load().double()]
    return torch.cat([*loads, logits.sum(0), logits.square().sum(0), count])
