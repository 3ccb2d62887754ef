"""What an MoE layer says beside its output: losses and routing travel out with the result."""

from dataclasses import dataclass, field

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Record:
    """One layer's routing in one forward pass.

    ``losses`` holds the layer's weighted loss terms by name (``balance``, ``z``), scalars in the
    graph; their sum is added to the training loss exactly once. They are this rank's *share* (see
    ``moe/reduce.py``) and exist in training only. ``row`` is the batch row that each token of
    ``routing`` came from (padding was left out before routing).
    """

    layer: str
    routing: Routing
    row: Int[Tensor, "T"]
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
