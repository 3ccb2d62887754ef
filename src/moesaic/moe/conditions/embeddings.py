"""Gates that read the embedding of a row's tag, or of the token, besides or instead of the state.

Letters: T tokens, D model dim, C what a gate reads.
"""

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import Context
from moesaic.moe.gates import Condition, Reads


class OnTag(Condition):
    """Logits ``W x + U p``, p the input embedding of the row's first token (its language tag).

    Task-prompt-guided routing as in JiuZhang 2.0 (2306.11027), with the tag as the prompt; the sum
    is our reading. Rows of an encoder, too, begin with the tag of the language to be written.
    """

    def reads(self) -> Reads:
        return "prompt"

    def dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return Reading(self.reads(), state=True)

    def kept(self, dim: int) -> int:
        return dim


class OnlyTag(Condition):
    """Logits ``U p``: all tokens of a row take the same experts.

    Task-level routing (2110.03742) by target language: a translation into one language needs only
    the experts of its tag.
    """

    def reads(self) -> Reads:
        return "prompt"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return Reading(self.reads(), state=False)

    def kept(self, dim: int) -> int:
        return -dim

    def shared_kept(self, dim: int) -> int:
        return dim


class OnToken(Condition):
    """Logits ``W x + U e``, e the token's input embedding, without its position."""

    def reads(self) -> Reads:
        return "token"

    def dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return Reading(self.reads(), state=True)

    def kept(self, dim: int) -> int:
        return dim


class OnlyToken(Condition):
    """Logits ``U e``: a vocabulary item takes the same experts wherever it stands.

    What OpenMoE (2402.01739) finds trained routers to come close to (context-independent
    specialisation), made exact: a baseline for how much context a router uses.
    """

    def reads(self) -> Reads:
        return "token"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return Reading(self.reads(), state=False)

    def kept(self, dim: int) -> int:
        return -dim


class Reading(nn.Module):
    """Puts the embedding that ``reads`` names beside the state, or in its place."""

    def __init__(self, reads: Reads, *, state: bool) -> None:
        super().__init__()
        self.reads, self.state = reads, state

    def forward(self, x: Float[Tensor, "T D"], *, context: Context) -> Float[Tensor, "T C"]:
        given = context.prompt if self.reads == "prompt" else context.embedded
        if given is None:
            raise TypeError(f"the context does not say the {self.reads}'s embedding")
        return torch.cat([x, given.float()], -1) if self.state else given.float()
