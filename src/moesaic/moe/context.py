"""Context: what a layer may know of its tokens besides their states, and what layers hand on.

Letters: T tokens, D model dim, E experts, P width of a router's own state.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.random import hash_combine, hash_name, bits_to_uniform


@dataclass(frozen=True, slots=True)
class TokenContext:
    """One pass's real tokens, padding left out.

    ``row`` and ``position`` are a token's place in the batch, ``token`` its vocabulary id, ``tag``
    the id of the first token of its row (a language tag). ``row_key`` is the key of its row: the
    same whichever rank holds it, so what is drawn here does not depend on the layout.
    ``embedded`` are the tokens' input embeddings and ``prompt`` those of their tags, where a rule
    asks for them (``Condition.reads``).
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
        row = hash_combine(self.row_key, hash_name("row"))  # or keys 2 and 3 would meet at positions 0 and 1
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
