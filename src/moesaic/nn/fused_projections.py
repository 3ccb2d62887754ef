"""Fused projections: several linear maps that are stored as one matrix (q, k, v; gate and value).

An optimizer that treats a matrix as a whole (Muon) has to treat each map by itself.
"""

from collections.abc import Mapping

from torch import nn


class FusedProjections(nn.Module):
    """Base of modules with fused projections."""

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        """Return the output widths of the maps in each fused matrix, by its name in this module.

        Outputs are the rows of a matrix [out, in], and the last dim of expert weights [E, in, out].
        """
        raise NotImplementedError


def gate_and_value(width: int, *, hidden: int) -> tuple[int, ...]:
    """Return the output widths of an up projection: two maps if its activation is gated."""
    return (hidden,) * (width // hidden)


def fused_outputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the output widths of the fused matrices of a model, by parameter name in the model."""
    return {
        f"{path}.{name}" if path else name: widths
        for path, module in model.named_modules()
        if isinstance(module, FusedProjections)
        for name, widths in module.fused_outputs().items()
        if len(widths) > 1
    }
