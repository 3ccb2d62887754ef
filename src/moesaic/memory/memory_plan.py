"""Memory plan: the tier of parameters, gradients, optimizer states and activations."""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Config
from moesaic.memory.tier import MAX_IN_FLIGHT_BYTES, DeviceMemory, Tier


class MemoryPlan(Config):
    """The memory tier of each purpose, all on the device by default (ZeRO-Offload, 2101.06840).

    ``in_flight_bytes`` bounds, for each purpose, the copies that are under way or in use at once.
    ``late_steps``: experts whose gradient is zero are updated when they are next used, to the same
    bits, at most so many steps late; until then their gradients and states on a tier do not move.
    ``run_ahead_bytes``: updates on a tier begin before the gradient norm is known, and are rolled
    back if it clips them (2509.21271); so many bytes of old values are kept in host memory. 0 is
    off.
    """

    parameters: Tier = DeviceMemory()
    gradients: Tier = DeviceMemory()
    optimizer_states: Tier = DeviceMemory()
    activations: Tier = DeviceMemory()
    in_flight_bytes: Annotated[int, Field(ge=1)] = MAX_IN_FLIGHT_BYTES
    late_steps: Annotated[int, Field(ge=0)] = 0
    run_ahead_bytes: Annotated[int, Field(ge=0)] = 0

    @property
    def offloads(self) -> bool:
        """Whether gradients or optimizer states, as in ZeRO-Offload, are not on the device."""
        return not (self.gradients.is_device and self.optimizer_states.is_device)
