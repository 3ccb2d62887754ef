"""What a model returns in training: states where a token is predicted, and the routing records."""

from dataclasses import dataclass

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.record import RoutingRecord


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Decoder states at the predicted positions only, in row-major order.

    Logits are not made here: ``model.logits(hidden)`` or a chunked loss makes them, so a batch
    never pays for positions that nobody scores.
    """

    hidden: Float[Tensor, "N D"]
    label: Int[Tensor, "N"]
    row: Int[Tensor, "N"]
    records: tuple[RoutingRecord, ...]
