"""Gate: what the rules of one layer see when they choose; and what they learn from afterwards.

Letters: T tokens, E experts (spare ones included).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import TokenContext

RuleState = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RouterContext:
    """Float32 logits, in the graph, and what goes with them.

    ``bias`` is what a balance rule adds to scores when experts are chosen, never to weights (None
    where no rule does). ``spare`` is how many of the last experts do no work (``spare.py``).
    ``state`` holds the rule's own tensors (see ``Learner``).
    """

    logits: Float[Tensor, "T E"]
    context: TokenContext
    training: bool = False
    bias: Float[Tensor, "E"] | None = None
    num_null_experts: int = 0
    state: RuleState = field(default_factory=dict)

    @staticmethod
    def from_logits(logits: Float[Tensor, "T E"], *, training: bool = False) -> "RouterContext":
        """Make the gate of logits that belong to no batch."""
        return RouterContext(logits, TokenContext.unbatched(logits.shape[0], device=logits.device), training)

    def with_state(self, state: RuleState) -> "RouterContext":
        """Return the same with another rule's state."""
        return replace(self, state=state)

    def biased_scores(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return detached scores to choose by."""
        return scores.detach() if self.bias is None else scores.detach() + self.bias


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Sums over all tokens, micro-batches and ranks of one optimizer step. All float64.

    ``load`` counts edges per expert as selected, ``kept`` those that a limit left, ``tokens`` the
    tokens; ``logits`` and ``squares`` add up logits, before any noise, and their squares
    over tokens.
    """

    load: Float[Tensor, "E"]
    kept_load: Float[Tensor, "E"]
    logit_sum: Float[Tensor, "E"]
    logit_square_sum: Float[Tensor, "E"]
    num_tokens: Float[Tensor, ""]

    @staticmethod
    def from_vector(vector: Float[Tensor, "S"]) -> "RoutingStats":
        """Read the vector [4 E + 1] that ranks add up."""
        load, kept, logits, squares = vector[:-1].view(4, -1)
        return RoutingStats(load, kept, logits, squares, vector[-1])


class StatefulRule:
    """Mixin of rules with a state of their own, kept by the router and saved with the weights.

    A rule is a frozen value: it says what its tensors start as, and what becomes of them after an
    optimizer step. Nothing changes during a forward pass, so recomputing one changes nothing.
    """

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        """Return the tensors that the rule starts with, by name."""
        del num_experts
        return {}

    def update_state(self, state: RuleState, *, stats: RoutingStats) -> RuleState:
        """Return the state after a step in which ``seen`` was seen. The same on every rank."""
        del stats
        return state
