"""Adapters of expert weights that add to them: of a few values, or of a few experts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from moesaic.moe.experts import DirectExperts, ExpertAdapter, FunctionalExperts, GroupedExperts
from moesaic.nn.initializer import Initializer, normal_parameter
from moesaic.nn.sparse_adapter import SparseValues


class SparseExperts(SparseValues, ExpertAdapter):
    """Trains some values of ``up``, ``down`` or both of every expert."""

    def __init__(
        self, experts: GroupedExperts, *, matrices: Collection[str], density: float, path: str
    ) -> None:
        super().__init__()
        for name in matrices:
            self.add_values(name, experts.get_parameter(name), density=density, path=path)

    def over(self, experts: FunctionalExperts) -> DirectExperts:
        up, down = experts.weights.up, experts.weights.down
        if "up" in self.kinds:
            up = up + self.difference("up", up, first=self.first_expert).to(up.dtype)
        if "down" in self.kinds:
            down = down + self.difference("down", down, first=self.first_expert).to(down.dtype)
        return replace(experts, weights=replace(experts.weights, up=up, down=down))


class ChosenExperts(ExpertAdapter):
    """Trains all values of a few experts: ``up_delta`` [S, D, G] for the S experts ``chosen``."""

    def __init__(
        self, experts: GroupedExperts, *, matrices: Collection[str], chosen: Sequence[int]
    ) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.register_buffer("chosen", torch.tensor(tuple(chosen)))
        for name in self.matrices:
            weight = experts.get_parameter(name)
            with torch.device(weight.device):
                delta = normal_parameter(len(chosen), *weight.shape[1:], std=0.0)
            self.register_parameter(f"{name}_delta", delta)

    def initializers(self) -> Mapping[str, Initializer]:
        return {f"{name}_delta": Initializer("expert", std=0.0) for name in self.matrices}

    def over(self, experts: FunctionalExperts) -> DirectExperts:
        changed = {}
        for name in self.matrices:
            weight = experts.weights.up if name == "up" else experts.weights.down
            delta = self.get_parameter(f"{name}_delta").to(weight.dtype)
            changed[name] = weight.index_add(0, self.get_buffer("chosen"), delta)
        return replace(experts, weights=replace(experts.weights, **changed))
