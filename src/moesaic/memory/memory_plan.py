"""Memory plan: the tier of parameters, gradients, optimizer states and activations."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.memory.tier import MAX_IN_FLIGHT_BYTES, DeviceMemory, Tier


class MemoryPlan(Config):
    """The memory tier of each purpose, all on the device by default (ZeRO-Offload, 2101.06840).

    ``parameters`` are those of blocks, but for what ZeRO shards; others stay on the device.
    ``in_flight_bytes`` bounds, for each purpose, the copies that are under way or in use at once.
    ``late_steps``: experts whose gradient is zero are updated when they are next used, to the same
    bits, at most so many steps late; until then their gradients and states on a tier do not move.
    ``run_ahead_bytes``: updates on a tier begin before the gradient norm is known, and are rolled
    back if it clips them (2509.21271); so many bytes of old values are kept in host memory. 0 is
    off; a pipeline, whose gradients are complete at the end of a step, refuses more.
    """

    parameters: Tier = DeviceMemory()
    gradients: Tier = DeviceMemory()
    optimizer_states: Tier = DeviceMemory()
    activations: Tier = DeviceMemory()
    in_flight_bytes: Annotated[int, Field(ge=1)] = MAX_IN_FLIGHT_BYTES
    late_steps: Annotated[int, Field(ge=0)] = 0
    run_ahead_bytes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.run_ahead_bytes and self.optimizer_states.is_device:
            raise ValueError(
                f"run_ahead_bytes={self.run_ahead_bytes} with optimizer_states=DeviceMemory, which "
                "are updated after backward: set optimizer_states=HostMemory, or run_ahead_bytes=0"
            )
        if self.late_steps and not self.offloads:
            raise ValueError(
                f"late_steps={self.late_steps} with gradients and optimizer_states=DeviceMemory: "
                "none move that could be late: set optimizer_states=HostMemory, or late_steps=0"
            )
        return self

    @property
    def offloads(self) -> bool:
        """Whether gradients or optimizer states, as in ZeRO-Offload, are not on the device."""
        return not (self.gradients.is_device and self.optimizer_states.is_device)
