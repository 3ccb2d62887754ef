"""Router: condition -> noise -> gate -> select -> limit, with balance beside it.

Float32 throughout, since it decides.

Letters: T tokens, D model dim, E experts (spare ones included).
"""

from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Scores
from moesaic.moe.config import MoE
from moesaic.moe.context import Carry, Context
from moesaic.moe.gate import Gate, Seen
from moesaic.moe.gates import Place
from moesaic.moe.ranks import Ranks
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Routed:
    """The edges, this rank's share of each weighted balance term, and the logits, detached.

    ``sums`` [4 E + 1] float64 is what the pass was like over all ranks (see ``Seen``), in training
    only; ``carry`` is for the next layer.
    """

    routing: Routing
    losses: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "T E"]
    carry: Carry
    sums: Float[Tensor, "S"] | None = None


class Router(nn.Module):
    """A gate and the rules of its config; the state of rules that learn is its buffers."""

    heard: Tensor

    def __init__(self, config: MoE, *, dim: int, place: Place) -> None:
        super().__init__()
        reads = config.condition.dim(dim)
        self.gate = config.link.gate(dim=reads, experts=config.routed, place=place)
        self.condition = config.condition.build(dim=dim)
        self.config = config
        for owner, rule in config.learners():
            for name, start in rule.start(config.routed).items():
                self.register_buffer(f"{owner}_{name}", start)
        heard = torch.zeros(4 * config.routed + 1, dtype=torch.float64)
        self.register_buffer("heard", heard, persistent=False)

    def forward(
        self, x: Float[Tensor, "T D"], *, context: Context, carry: Carry, ranks: Ranks
    ) -> Routed:
        """Return the edges. Collective over ``ranks``."""
        rules, training = self.config, self.training
        with torch.autocast(x.device.type, enabled=False):
            read = self.condition(x.float(), context=context)
            read = rules.noise.on_input(read, context=context, training=training)
            scored = self.gate(read, carry=carry)
            gate = self._noisy(
                Gate(scored.logits, context, training, self._bias(), rules.spare.count())
            )
            gate = gate.having(self.state("select"))
            chosen = rules.select(gate)
            limited = rules.limit(chosen, gate=gate, ranks=ranks)
            routing = rules.select.finish(limited)
            sums = self._sums(scored.logits, chosen=chosen, limited=limited, ranks=ranks)
            losses = self._losses(gate, chosen=chosen, sums=sums, ranks=ranks)
        return Routed(routing, losses, gate.logits.detach(), scored.carry, sums)

    def state(self, owner: str) -> dict[str, Tensor]:
        """Return the tensors of one rule, by name."""
        prefix = f"{owner}_"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._buffers.items()
            if name.startswith(prefix) and tensor is not None
        }

    @torch.no_grad()
    def hear(self, sums: Float[Tensor, "S"]) -> None:
        """Remember a micro-batch of the step in progress."""
        self.heard += sums.to(self.heard.device)

    @torch.no_grad()
    def learn(self) -> None:
        """Let the rules learn from the step that is done, and forget it."""
        seen = Seen.of(self.heard)
        for owner, rule in self.config.learners():
            state = self.state(owner)
            for name, value in (rule.learn(state, seen=seen) if state else {}).items():
                state[name].copy_(value)
        self.forget()

    def forget(self) -> None:
        """Forget the step in progress."""
        self.heard.zero_()

    def _bias(self) -> Float[Tensor, "E"] | None:
        given = [
            term.bias(self.state(f"balance{number}"))
            for number, term in enumerate(self.config.balance)
        ]
        there = [bias for bias in given if bias is not None]
        return torch.stack(there).sum(0) if there else None

    def _noisy(self, gate: Gate) -> Gate:
        gate = gate.having(self.state("noise"))
        logits = self.config.noise.on_logits(gate)
        return Gate(logits, gate.context, gate.training, gate.bias, gate.spare)

    def _sums(
        self, logits: Float[Tensor, "T E"], *, chosen: Routing, limited: Routing, ranks: Ranks
    ) -> Float[Tensor, "S"] | None:
        if not self.training:
            return None
        logits = logits.detach().double()
        count = torch.full((1,), logits.shape[0], dtype=torch.float64, device=logits.device)
        loads = [chosen.load().double(), limited.load().double()]
        return ranks.sum(torch.cat([*loads, logits.sum(0), logits.square().sum(0), count]))

    def _losses(
        self, gate: Gate, *, chosen: Routing, sums: Float[Tensor, "S"] | None, ranks: Ranks
    ) -> dict[str, Float[Tensor, ""]]:
        if sums is None or not self.config.balance:
            return {}
        seen, before = Seen.of(sums), Seen.of(self.heard)
        probabilities = self.config.select.probabilities(gate)
        losses: dict[str, Float[Tensor, ""]] = {}
        for number, term in enumerate(self.config.balance):
            own = gate.having(self.state(f"balance{number}"))
            scores = Scores(
                gate=own,
                routing=chosen,
                probabilities=probabilities,
                load=seen.load,
                heard=before.load,
                tokens=seen.tokens,
                ranks=ranks,
            )
            zero = gate.logits.new_zeros(())
            losses[term.name] = losses.get(term.name, zero) + term(scores)
        return losses
