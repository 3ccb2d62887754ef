"""Context: what a layer may know of its tokens besides their states, and what layers hand on.

Letters: T tokens, D model dim, E experts, P width of a router's own state.

Gate: what the rules of one layer see when they choose; and what they learn from afterwards.

Letters: T tokens, E experts (spare ones included).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.counter_rng import bits_to_uniform, hash_combine, hash_name


@dataclass(frozen=True, slots=True)
class TokenContext:
    """One pass's real tokens, padding left out.

    ``row`` and ``position`` are a token's place in the batch, ``token`` its vocabulary id, ``tag``
    the id of the first token of its row (a language tag). ``row_key`` is the key of its row: the
    same whichever rank holds it, so what is drawn here does not depend on the layout.
    ``embedded`` are the tokens' input embeddings and ``prompt`` those of their tags, where a rule
    asks for them (``RouterInput.reads``).
    """

    row: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    token: Int[Tensor, "T"]
    tag: Int[Tensor, "T"]
    row_key: Int[Tensor, "T"]
    token_embedding: Float[Tensor, "T D"] | None = None
    tag_embedding: Float[Tensor, "T D"] | None = None
    salt: int = 0

    @staticmethod
    def unbatched(tokens: int, *, device: torch.device | str = "cpu") -> "TokenContext":
        """Make the context of tokens that belong to no batch: one row, in order, ids zero."""
        none = torch.zeros(tokens, dtype=torch.long, device=device)
        return TokenContext(none, torch.arange(tokens, device=device), none, none, none)

    def for_layer(self, layer: str) -> "TokenContext":
        """Return the same tokens with random numbers of their own for a layer."""
        return replace(self, salt=hash_name(layer))

    def random_key(self, purpose: str) -> Int[Tensor, "T"]:
        """Return random int64, a function of row, position, layer and purpose."""
        row = hash_combine(
            self.row_key, hash_name("row")
        )  # or keys 2 and 3 would meet at positions 0 and 1
        return hash_combine(hash_combine(row, self.position), self.salt ^ hash_name(purpose))

    def random_bits(self, purpose: str, *, width: int) -> Int[Tensor, "T width"]:
        """Return random int64, a function of row, position, layer, purpose and column."""
        key = self.random_key(purpose)
        return hash_combine(key[:, None], torch.arange(width, device=key.device))

    def uniform(self, purpose: str, *, width: int) -> Float[Tensor, "T width"]:
        """Return float32 in [0, 1), drawn as ``bits`` are."""
        return bits_to_uniform(self.random_bits(purpose, width=width))

    def normal(self, purpose: str, *, width: int) -> Float[Tensor, "T width"]:
        """Return standard normal float32 (Box and Muller 1958), drawn as ``bits`` are."""
        one = 1 - self.uniform(purpose + " radius", width=width)  # never zero
        angle = 2 * torch.pi * self.uniform(purpose + " angle", width=width)
        return (-2 * one.log()).sqrt() * angle.cos()


@dataclass(frozen=True, slots=True)
class RouterState:
    """What the MoE layers of one stack hand on, token by token.

    ``hidden`` is a recurrent router's state, ``logits`` are scores decided before (by the layer
    below, or once for all layers); ``shared`` is the module that the layers share.
    """

    hidden: Float[Tensor, "T P"] | None = None
    logits: Float[Tensor, "T E"] | None = None
    shared: nn.Module | None = None


RuleState = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RouterContext:
    """Float32 logits, in the graph, and what goes with them.

    ``bias`` is what a balance rule adds to scores when experts are chosen, never to weights (None
    where no rule does). ``spare`` is how many of the last experts do no work (``spare.py``).
    ``state`` holds the rule's own tensors (see ``StatefulRule``).
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
        return RouterContext(
            logits, TokenContext.unbatched(logits.shape[0], device=logits.device), training
        )

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
