"""Gate: what the rules of one layer see when they choose; and what they learn from afterwards.

Letters: T tokens, E experts (spare ones included).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import Context

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Gate:
    """Float32 logits, in the graph, and what goes with them.

    ``bias`` is what a balance rule adds to scores when experts are chosen, never to weights (None
    where no rule does). ``spare`` is how many of the last experts do no work (``spare.py``).
    ``state`` holds the rule's own tensors (see ``Learner``).
    """

    logits: Float[Tensor, "T E"]
    context: Context
    training: bool = False
    bias: Float[Tensor, "E"] | None = None
    spare: int = 0
    state: State = field(default_factory=dict)

    @staticmethod
    def alone(logits: Float[Tensor, "T E"], *, training: bool = False) -> "Gate":
        """Make the gate of logits that belong to no batch."""
        return Gate(logits, Context.plain(logits.shape[0], device=logits.device), training)

    def having(self, state: State) -> "Gate":
        """Return the same with another rule's state."""
        return replace(self, state=state)

    def biased(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return detached scores to choose by."""
        return scores.detach() if self.bias is None else scores.detach() + self.bias


@dataclass(frozen=True, slots=True)
class Seen:
    """Sums over all tokens, micro-batches and ranks of one optimizer step. All float64.

    ``load`` counts edges per expert as selected, ``kept`` those that a limit left, ``tokens`` the
    tokens; ``logits`` and ``squares`` add up logits, before any noise, and their squares
    over tokens.
    """

    load: Float[Tensor, "E"]
    kept: Float[Tensor, "E"]
    logits: Float[Tensor, "E"]
    squares: Float[Tensor, "E"]
    tokens: Float[Tensor, ""]

    @staticmethod
    def of(sums: Float[Tensor, "S"]) -> "Seen":
        """Read the vector [4 E + 1] that ranks add up."""
        load, kept, logits, squares = sums[:-1].view(4, -1)
        return Seen(load, kept, logits, squares, sums[-1])


class Learner:
    """Mixin of rules with a state of their own, kept by the router and saved with the weights.

    A rule is a frozen value: it says what its tensors start as, and what becomes of them after an
    optimizer step. Nothing changes during a forward pass, so recomputing one changes nothing.
    """

    def start(self, num_experts: int) -> dict[str, Tensor]:
        """Return the tensors that the rule starts with, by name."""
        del num_experts
        return {}

    def learn(self, state: State, *, seen: Seen) -> State:
        """Return the state after a step in which ``seen`` was seen. The same on every rank."""
        del seen
        return state
