"""Sparse: whether a model has experts, and if so their number, size and rules."""

from collections.abc import Iterator

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.moe.around import Beside, Exchange, NothingBeside, Whole
from moesaic.moe.balance import Balance, SwitchBalance
from moesaic.moe.experts import Expert, FeedForwardExpert
from moesaic.moe.gate import Learner
from moesaic.moe.gates import Condition, Link, Unconditioned, Unlinked
from moesaic.moe.limit import Dropless, Limit
from moesaic.moe.noise import Noise, NoNoise
from moesaic.moe.select import Select, SwitchTop1
from moesaic.moe.spare import NoSpare, Spare
from moesaic.nn.feed_forward import FeedForward


class Sparse(Choice):
    """Family: what stands in the place of every k-th feed-forward."""


class NoMoE(Sparse):
    """Every feed-forward is dense."""


class MoE(Sparse):
    """A mixture of ``experts`` feed-forwards; ``hidden`` defaults to the dense width."""

    experts: int = Field(ge=1)
    hidden: int | None = Field(default=None, ge=1)
    select: Select = SwitchTop1()
    limit: Limit = Dropless()
    balance: tuple[Balance, ...] = (SwitchBalance(),)
    noise: Noise = NoNoise()
    expert: Expert = FeedForwardExpert()
    beside: Beside = NothingBeside()
    spare: Spare = NoSpare()
    exchange: Exchange = Whole()
    condition: Condition = Unconditioned()
    link: Link = Unlinked()

    @property
    def routed(self) -> int:
        """Experts that the router chooses from, spare ones included."""
        return self.experts + self.spare.count()

    def feed_forward(self, dense: FeedForward) -> FeedForward:
        """Return the feed-forward of one expert in a model with this dense one."""
        return dense if self.hidden is None else dense.replace(hidden=self.hidden)

    def learners(self) -> Iterator[tuple[str, Learner]]:
        """Yield the rules that may have a state of their own, by name."""
        yield "select", self.select
        yield "noise", self.noise
        for number, term in enumerate(self.balance):
            yield f"balance{number}", term
