"""Gates that read the embedding of a row's tag, or of the token, besides or instead of the state.

Letters: T tokens, D model dim, C what a gate reads.
"""

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import TokenContext
from moesaic.moe.gates import RouterInput, EmbeddingSource


class HiddenStateAndTag(RouterInput):
    """Logits ``W x + U p``, p the input embedding of the row's first token (its language tag).

    Task-prompt-guided routing as in JiuZhang 2.0 (2306.11027), with the tag as the prompt; the sum
    is our reading. Rows of an encoder, too, begin with the tag of the language to be written.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "prompt"

    def input_dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=True)

    def saved_activations(self, dim: int) -> int:
        return dim


class TagOnly(RouterInput):
    """Logits ``U p``: all tokens of a row take the same experts.

    Task-level routing (2110.03742) by target language: a translation into one language needs only
    the experts of its tag.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "prompt"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=False)

    def saved_activations(self, dim: int) -> int:
        return -dim

    def shared_saved_activations(self, dim: int) -> int:
        return dim


class HiddenStateAndToken(RouterInput):
    """Logits ``W x + U e``, e the token's input embedding, without its position."""

    def embedding_source(self) -> EmbeddingSource:
        return "token"

    def input_dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=True)

    def saved_activations(self, dim: int) -> int:
        return dim


class TokenOnly(RouterInput):
    """Logits ``U e``: a vocabulary item takes the same experts wherever it stands.

    What OpenMoE (2402.01739) finds trained routers to come close to (context-independent
    specialisation), made exact: a baseline for how much context a router uses.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "token"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=False)

    def saved_activations(self, dim: int) -> int:
        return -dim


class EmbeddingInput(nn.Module):
    """Puts the embedding that ``reads`` names beside the state, or in its place."""

    def __init__(self, embedding_source: EmbeddingSource, *, with_hidden_state: bool) -> None:
        super().__init__()
        self.embedding_source, self.with_hidden_state = embedding_source, with_hidden_state

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T C"]:
        given = context.tag_embedding if self.embedding_source == "prompt" else context.token_embedding
        if given is None:
            raise TypeError(f"the context does not say the {self.embedding_source}'s embedding")
        return torch.cat([x, given.float()], -1) if self.with_hidden_state else given.float()
