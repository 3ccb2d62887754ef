"""Sparse: whether a model has experts, and if so their number, size and routing rules."""

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.moe.balance import Balance, SwitchBalance
from moesaic.moe.limit import Dropless, Limit
from moesaic.moe.noise import Noise, NoNoise
from moesaic.moe.select import Select, SwitchTop1


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
