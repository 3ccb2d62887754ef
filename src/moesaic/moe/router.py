"""Router: condition -> noise -> gate -> select -> limit, with balance beside it.

Float32 throughout, since it decides.

Letters: T tokens, D model dim, E experts (spare ones included).
"""

from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import BalanceInputs
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.config import MoE
from moesaic.moe.router_context import RouterContext, RouterState, RoutingStats, TokenContext
from moesaic.moe.router_logits import LayerIndex
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """The edges, this rank's share of each weighted balance term, and the logits, detached.

    ``sums`` [4 E + 1] float64 is what the pass was like over all ranks (see ``RoutingStats``), in training
    only; ``carry`` is for the next layer.
    """

    routing: Routing
    losses: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "T E"]
    router_state: RouterState
    stats_vector: Float[Tensor, "S"] | None = None


class Router(nn.Module):
    """A gate and the rules of its config; the state of rules that learn is its buffers."""

    stats_sum: Tensor

    def __init__(self, config: MoE, *, dim: int, layer_index: LayerIndex) -> None:
        super().__init__()
        reads = config.router_input.input_dim(dim)
        self.gate = config.cross_layer.build_gate(
            dim=reads, experts=config.num_router_outputs, layer_index=layer_index
        )
        self.router_input = config.router_input.build(dim=dim)
        self.config = config
        for owner, rule in config.stateful_rules():
            for name, start in rule.initial_state(config.num_router_outputs).items():
                self.register_buffer(f"{owner}_{name}", start)
        stats_sum = torch.zeros(4 * config.num_router_outputs + 1, dtype=torch.float64)
        self.register_buffer("stats_sum", stats_sum, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        context: TokenContext,
        router_state: RouterState,
        batch_group: BatchGroup,
    ) -> RouterOutput:
        """Return the edges. Collective over ``ranks``."""
        rules, training = self.config, self.training
        with torch.autocast(x.device.type, enabled=False):
            read = self.router_input(x.float(), context=context)
            read = rules.noise.apply_to_input(read, context=context, training=training)
            scored = self.gate(read, router_state=router_state)
            gate = self._add_noise(
                RouterContext(
                    scored.logits,
                    context,
                    training,
                    self._selection_bias(),
                    rules.null_experts.count(),
                )
            )
            gate = gate.with_state(self.rule_state("select"))
            chosen = rules.select(gate)
            limited = rules.limit(chosen, router=gate, batch_group=batch_group)
            routing = rules.select.renormalise(limited)
            sums = self._stats_vector(
                scored.logits, chosen=chosen, limited=limited, batch_group=batch_group
            )
            losses = self._losses(gate, chosen=chosen, stats_vector=sums, batch_group=batch_group)
        return RouterOutput(routing, losses, gate.logits.detach(), scored.router_state, sums)

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
        """Remember a micro-batch of the step in progress."""
        self.stats_sum += stats_vector.to(self.stats_sum.device)

    @torch.no_grad()
    def update_rules(self) -> None:
        """Let the rules learn from the step that is done, and forget it."""
        seen = RoutingStats.from_vector(self.stats_sum)
        for owner, rule in self.config.stateful_rules():
            state = self.rule_state(owner)
            for name, value in (rule.update_state(state, stats=seen) if state else {}).items():
                state[name].copy_(value)
        self.reset_stats()

    def reset_stats(self) -> None:
        """Forget the step in progress."""
        self.stats_sum.zero_()

    def _selection_bias(self) -> Float[Tensor, "E"] | None:
        given = [
            term.selection_bias(self.rule_state(f"balance{number}"))
            for number, term in enumerate(self.config.balance)
        ]
        there = [bias for bias in given if bias is not None]
        return torch.stack(there).sum(0) if there else None

    def _add_noise(self, router: RouterContext) -> RouterContext:
        router = router.with_state(self.rule_state("noise"))
        logits = self.config.noise.apply_to_logits(router)
        return RouterContext(
            logits, router.context, router.training, router.bias, router.num_null_experts
        )

    def _stats_vector(
        self,
        logits: Float[Tensor, "T E"],
        *,
        chosen: Routing,
        limited: Routing,
        batch_group: BatchGroup,
    ) -> Float[Tensor, "S"] | None:
        if not self.training:
            return None
        logits = logits.detach().double()
        count = torch.full((1,), logits.shape[0], dtype=torch.float64, device=logits.device)
        loads = [chosen.load().double(), limited.load().double()]
        return batch_group.sum(torch.cat([*loads, logits.sum(0), logits.square().sum(0), count]))

    def _losses(
        self,
        router: RouterContext,
        *,
        chosen: Routing,
        stats_vector: Float[Tensor, "S"] | None,
        batch_group: BatchGroup,
    ) -> dict[str, Float[Tensor, ""]]:
        if stats_vector is None or not self.config.balance:
            return {}
        seen, before = (
            RoutingStats.from_vector(stats_vector),
            RoutingStats.from_vector(self.stats_sum),
        )
        probabilities = self.config.select.probabilities(router)
        losses: dict[str, Float[Tensor, ""]] = {}
        for number, term in enumerate(self.config.balance):
            own = router.with_state(self.rule_state(f"balance{number}"))
            scores = BalanceInputs(
                router=own,
                routing=chosen,
                probabilities=probabilities,
                load=seen.load,
                accumulated_load=before.load,
                num_tokens=seen.num_tokens,
                batch_group=batch_group,
            )
            zero = router.logits.new_zeros(())
            losses[term.name] = losses.get(term.name, zero) + term(scores)
        return losses
