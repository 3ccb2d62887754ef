"""Optimizers: the family that a config chooses from, and the update rule of each parameter.

Kinds of parameters: ``matrix`` (2-D weights), ``expert`` (stacked matrices ``[E, M, N]``),
``embedding``, ``router``, ``norm``, ``bias`` (``model/weights.py: parameter_kinds``).
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.optim.eight_bit_adamw import EightBitAdamWRule
from moesaic.optim.group_update import UpdateRule
from moesaic.optim.master_weights import Float32Master, MasterWeights
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.update_rules import AdamWRule, MuonRule

ParameterKind = Literal["embedding", "norm", "bias", "matrix", "expert", "router"]
PARAMETER_KINDS: tuple[str, ...] = get_args(ParameterKind)

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Optimizer(Choice):
    """Family of optimizers: which update rule, learning rate and decay each parameter has."""

    @abstractmethod
    def param_group(self, parameter: nn.Parameter, *, kind: str) -> dict[str, Any]:
        """Return a parameter's group fields: ``name``, ``rule``, ``lr``, ``weight_decay``."""

    def build(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        kinds: Mapping[str, str],
        master_weights: MasterWeights | None = None,
    ) -> NamedOptimizer:
        """Build the optimizer of a model's trainable parameters.

        ``kinds`` maps each parameter's name to one of ``PARAMETER_KINDS``; ``master_weights`` (by
        default float32 copies) is for those of a narrow dtype. Raises ValueError for a parameter
        without a kind or with an unknown one.
        """
        groups: dict[str, dict[str, Any]] = {}
        members: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            kind = kinds.get(name)
            if kind not in PARAMETER_KINDS:
                raise ValueError(
                    f"{name}: kind is {kind!r}, expected one of {', '.join(PARAMETER_KINDS)}"
                )
            fields = self.param_group(parameter, kind=kind)
            groups.setdefault(fields["name"], fields)
            members[fields["name"]].append((name, parameter))
        listed = [groups[name] | {"params": members[name]} for name in sorted(groups)]
        return NamedOptimizer(listed, master_weights=master_weights or Float32Master())


class OptimizerStates(Choice):
    """Family: how AdamW keeps its two moments between steps."""

    @abstractmethod
    def rule(self, float32: AdamWRule, *, kind: str, ndim: int) -> UpdateRule:
        """Return the update rule of the parameters of a kind, with so many dims."""


class Float32States(OptimizerStates):
    """Moments in float32: 8 bytes for each value of a parameter."""

    def rule(self, float32: AdamWRule, *, kind: str, ndim: int) -> UpdateRule:
        del kind, ndim
        return float32


class EightBitStates(OptimizerStates):
    """Moments as 8-bit codes, with a float32 scale for each ``block`` values (arXiv:2110.02861).

    A block ends with its row, and a plan that cuts rows must cut them between blocks: so losses and
    checkpoints do not depend on the plan. A value takes ``2 + 8 / block`` bytes, or more where rows
    are shorter than a block. Moments of other ``kinds``, of vectors and Muon's stay float32.
    """

    block: Annotated[int, Field(ge=2, le=2**16)] = 256
    kinds: tuple[ParameterKind, ...] = ("embedding", "matrix", "expert")

    def rule(self, float32: AdamWRule, *, kind: str, ndim: int) -> UpdateRule:
        is_quantized = kind in self.kinds and ndim > 1
        return EightBitAdamWRule(float32, self.block) if is_quantized else float32


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), of many tensors at once.

    ``decayed_kinds`` are the kinds of parameters with weight decay; norms and biases have none.
    ``router_lr`` is the learning rate of the routers (None: that of all). ``states`` is the form of
    the moments between steps.
    """

    lr: Positive = 1e-3
    router_lr: Positive | None = None
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decayed_kinds: tuple[ParameterKind, ...] = ("embedding", "matrix", "expert", "router")
    states: OptimizerStates = Float32States()

    def param_group(self, parameter: nn.Parameter, *, kind: str) -> dict[str, Any]:
        decay = self.weight_decay if kind in self.decayed_kinds else 0.0
        lr = self.router_lr if kind == "router" and self.router_lr else self.lr
        float32 = AdamWRule(self.betas, self.eps)
        rule = self.states.rule(float32, kind=kind, ndim=parameter.ndim)
        name = "adamw" if rule is float32 else "adamw-8bit"
        return _group(f"{name}/{kind}", rule, lr=lr, decay=decay)


class UpdateScale(Choice):
    """The factor on Muon's orthogonal update of an ``[M, N]`` matrix, beside the learning rate."""

    @abstractmethod
    def __call__(self, rows: int, columns: int) -> float: ...


class MatchRMSAdamW(UpdateScale):
    """``rms * sqrt(max(M, N))``: the update has AdamW's usual root mean square, so both rules can
    share a learning rate and a weight decay (Moonlight, arXiv:2502.16982).
    """

    rms: Positive = 0.2

    def __call__(self, rows: int, columns: int) -> float:
        return self.rms * math.sqrt(max(rows, columns))


class Spectral(UpdateScale):
    """``sqrt(max(1, out / in))``: the original Muon, with learning rates near 0.02
    (kellerjordan.github.io/posts/muon).
    """

    def __call__(self, rows: int, columns: int) -> float:
        return math.sqrt(max(1.0, rows / columns))


class Muon(Optimizer):
    """Orthogonalized momentum for matrices and expert weights, AdamW for everything else.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with the decay and update size of
    arXiv:2502.16982. ``adamw`` has its own learning rate and decay. ``ns_steps`` counts
    Newton-Schulz iterations.
    """

    lr: Positive = 1e-3
    momentum: Fraction = 0.95
    weight_decay: NonNegative = 0.01
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    scale: UpdateScale = MatchRMSAdamW()
    adamw: AdamW = AdamW()

    def param_group(self, parameter: nn.Parameter, *, kind: str) -> dict[str, Any]:
        if (kind, parameter.ndim) not in (("matrix", 2), ("expert", 3)):
            return self.adamw.param_group(parameter, kind=kind)
        # a matrix is stored [out, in], expert weights [E, in, out]
        scale = self.scale if kind == "matrix" else partial(_transposed_scale, self.scale)
        rule = MuonRule(self.momentum, self.ns_steps, scale)
        return _group(f"muon/{kind}", rule, lr=self.lr, decay=self.weight_decay)


def _transposed_scale(scale: UpdateScale, rows: int, columns: int) -> float:
    return scale(columns, rows)


def _group(name: str, rule: UpdateRule, *, lr: float, decay: float) -> dict[str, Any]:
    return {"name": name, "rule": rule, "lr": lr, "weight_decay": decay}
