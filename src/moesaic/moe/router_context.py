"""Router context: the logits, tokens and state that a routing rule reads; its statistics.

Letters: T tokens, D model dim, E experts (null experts included), P width of a recurrent router's
state, S statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.counter_rng import bits_to_normal, bits_to_uniform, hash_combine, hash_name

RuleState = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TokenContext:
    """The tokens of one forward pass without padding, and the source of their random numbers.

    ``row`` and ``position`` locate a token in the batch of ``num_rows``, ``token`` is its
    vocabulary id, ``tag`` the id of the first token of its row (a language tag). ``row_key``
    identifies the row on every rank, so random numbers do not depend on the parallel layout.
    ``token_embedding`` and ``tag_embedding`` are input embeddings, present where the router reads
    them (``RouterInput.embedding_source``).
    """

    row: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    token: Int[Tensor, "T"]
    tag: Int[Tensor, "T"]
    row_key: Int[Tensor, "T"]
    token_embedding: Float[Tensor, "T D"] | None = None
    tag_embedding: Float[Tensor, "T D"] | None = None
    salt: int = 0
    num_rows: int = 1

    @staticmethod
    def unbatched(tokens: int, *, device: torch.device | str = "cpu") -> "TokenContext":
        """Return the context of one row of ``tokens`` tokens, ids zero, in order."""
        none = torch.zeros(tokens, dtype=torch.long, device=device)
        return TokenContext(none, torch.arange(tokens, device=device), none, none, none)

    def for_layer(self, layer: str) -> "TokenContext":
        """Return the same tokens with the random numbers of a layer."""
        return replace(self, salt=hash_name(layer))

    def random_key(self, purpose: str) -> Int[Tensor, "T"]:
        """Return random int64, a function of row, position, layer and purpose."""
        # without the name of the purpose, keys 2 and 3 would collide at positions 0 and 1
        row = hash_combine(self.row_key, hash_name("row"))
        return hash_combine(hash_combine(row, self.position), self.salt ^ hash_name(purpose))

    def random_bits(self, purpose: str, *, width: int) -> Int[Tensor, "T width"]:
        """Return random int64, a function of row, position, layer, purpose and column."""
        key = self.random_key(purpose)
        return hash_combine(key[:, None], torch.arange(width, device=key.device))

    def uniform(self, purpose: str, *, width: int) -> Float[Tensor, "T width"]:
        """Return float32 uniform in [0, 1), drawn like ``random_bits``."""
        return bits_to_uniform(self.random_bits(purpose, width=width))

    def normal(self, purpose: str, *, width: int) -> Float[Tensor, "T width"]:
        """Return standard normal float32, drawn like ``random_bits``."""
        radius, angle = (
            self.random_bits(f"{purpose} {part}", width=width) for part in ("radius", "angle")
        )
        return bits_to_normal(radius, angle)


@dataclass(frozen=True, slots=True)
class RouterState:
    """Per-token state that the routers of a stack pass from one MoE layer to the next.

    ``hidden`` is a recurrent router's hidden state, ``logits`` are logits computed earlier (by the
    MoE layer below, or once for all layers); ``shared`` is the module that all layers use.
    """

    hidden: Float[Tensor, "T P"] | None = None
    logits: Float[Tensor, "T E"] | None = None
    shared: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class RouterContext:
    """Router logits (float32, in the autograd graph) and the data that a routing rule reads.

    ``bias`` is added to scores when experts are selected, never to weights (None without a rule
    that sets it). The last ``num_null_experts`` experts are null experts (``null_experts.py``).
    ``state`` holds the tensors of the rule (see ``StatefulRule``).
    """

    logits: Float[Tensor, "T E"]
    context: TokenContext
    training: bool = False
    bias: Float[Tensor, "E"] | None = None
    num_null_experts: int = 0
    state: RuleState = field(default_factory=dict)

    @staticmethod
    def from_logits(logits: Float[Tensor, "T E"], *, training: bool = False) -> "RouterContext":
        """Return the context of logits that belong to no batch."""
        tokens = TokenContext.unbatched(logits.shape[0], device=logits.device)
        return RouterContext(logits, tokens, training)

    def with_state(self, state: RuleState) -> "RouterContext":
        """Return the same context with the state of another rule."""
        return replace(self, state=state)

    def biased_scores(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the detached scores by which experts are selected."""
        return scores.detach() if self.bias is None else scores.detach() + self.bias


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Routing statistics of one optimizer step: float64 sums over micro-batches and ranks.

    ``load`` counts edges per expert as selected, ``kept_load`` those left by the capacity limit;
    ``logit_sum`` and ``logit_square_sum`` add up logits before noise, and their squares, over
    tokens.
    """

    load: Float[Tensor, "E"]
    kept_load: Float[Tensor, "E"]
    logit_sum: Float[Tensor, "E"]
    logit_square_sum: Float[Tensor, "E"]
    num_tokens: Float[Tensor, ""]

    @staticmethod
    def from_vector(vector: Float[Tensor, "S"]) -> "RoutingStats":
        """Unpack the vector [4 E + 1] that ranks add up."""
        load, kept_load, logit_sum, logit_square_sum = vector[:-1].view(4, -1)
        return RoutingStats(load, kept_load, logit_sum, logit_square_sum, vector[-1])


class StatefulRule:
    """Mixin of routing rules with tensors of their own: buffers of the router, saved with it.

    A rule is a frozen config value. It returns the initial tensors, and the tensors after an
    optimizer step. A forward pass changes no state, so activation checkpointing may repeat it.
    """

    def initial_state(self, _num_experts: int, /) -> dict[str, Tensor]:
        """Return the initial tensors by name; none by default."""
        return {}

    def update_state(self, state: RuleState, _stats: RoutingStats, /) -> RuleState:
        """Return the state after a step with these statistics; the same on every rank."""
        return state
