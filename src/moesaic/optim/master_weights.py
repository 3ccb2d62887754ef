"""Master weights: how an optimizer keeps small updates of parameters of a narrow dtype (bfloat16).

A bfloat16 value has 8 significant bits, so an update below 1/512 of a value is lost if the sum is
rounded to the nearest.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.ops.stochastic_rounding import ShardPosition, round_stochastically, rounding_key


@dataclass(frozen=True, slots=True)
class ShardUpdate:
    """Which values an update changes: a parameter's name, the steps before, the shard's place."""

    name: str
    step: int
    position: ShardPosition


class MasterWeights(Choice):
    """Family: a float32 copy of narrow parameters, or none and random rounding.

    ``rounds_to_nearest``: update rules round the float32 values into parameters themselves.
    """

    rounds_to_nearest: ClassVar[bool] = False

    @property
    @abstractmethod
    def bytes_per_value(self) -> int:
        """Bytes of optimizer state for each value of a narrow parameter."""

    @abstractmethod
    def initial_state(self, parameter: Float[Tensor, "*N"]) -> dict[str, Tensor]:
        """Return what the optimizer keeps of a parameter's values."""

    @abstractmethod
    def float32_values(
        self, parameter: Float[Tensor, "*N"], state: dict[str, Tensor]
    ) -> Float[Tensor, "*N"]:
        """Return the float32 values that an update rule changes in place."""

    @abstractmethod
    def write_back(
        self, parameter: Float[Tensor, "*N"], values: Float[Tensor, "*N"], *, update: ShardUpdate
    ) -> None:
        """Round updated values into a parameter, where the update rule did not."""


class Float32Master(MasterWeights):
    """A float32 copy in the optimizer is updated, then rounded into the parameter (1710.03740)."""

    rounds_to_nearest: ClassVar[bool] = True

    @property
    def bytes_per_value(self) -> int:
        return 4

    def initial_state(self, parameter: Float[Tensor, "*N"]) -> dict[str, Tensor]:
        return {"master": parameter.detach().float()}

    def float32_values(
        self, parameter: Float[Tensor, "*N"], state: dict[str, Tensor]
    ) -> Float[Tensor, "*N"]:
        del parameter
        return state["master"]

    def write_back(
        self, parameter: Float[Tensor, "*N"], values: Float[Tensor, "*N"], *, update: ShardUpdate
    ) -> None:
        del parameter, values, update


class StochasticRounding(MasterWeights):
    """No copy: an updated value is rounded up or down at random, in expectation to itself.

    The random bits are a function of ``seed``, the step, the name of the parameter and the position
    of the value in the whole parameter (``ops/stochastic_rounding.py``): the same under every
    parallel plan, and after resuming.
    """

    seed: int = 0

    @property
    def bytes_per_value(self) -> int:
        return 0

    def initial_state(self, parameter: Float[Tensor, "*N"]) -> dict[str, Tensor]:
        del parameter
        return {}

    def float32_values(
        self, parameter: Float[Tensor, "*N"], state: dict[str, Tensor]
    ) -> Float[Tensor, "*N"]:
        del state
        return parameter.float()

    def write_back(
        self, parameter: Float[Tensor, "*N"], values: Float[Tensor, "*N"], *, update: ShardUpdate
    ) -> None:
        key = rounding_key(update.name, seed=self.seed, step=update.step)
        parameter.copy_(round_stochastically(values, key=key, position=update.position))
