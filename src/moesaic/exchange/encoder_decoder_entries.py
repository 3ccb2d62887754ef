"""Config entries of encoder-decoders: positions behind padding, NLLB's router, sparse layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.exchange.config_mapping import ConfigEntry, Theirs, field_of
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import (
    Balance,
    FirstChoiceBalance,
    RouterZLoss,
    SequenceBalance,
)
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import BatchPriority, Capacity, PositionPriority
from moesaic.moe.expert_selection import Top2, TopK
from moesaic.nn.positional_encoding import Sinusoidal

_SECOND = {"all": "highest", "sampling": "sampled", "random": "random"}


@dataclass(frozen=True)
class PositionsBehindPadding(ConfigEntry):
    """``pad_token_id``: the first token of a row has the position behind it (fairseq)."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        padding = theirs.get("pad_token_id", 1)
        if type(padding) is not int or padding < 0:
            raise ConfigError([f"pad_token_id: found {show_value(padding)}, expected an id"])
        return {"position.offset": padding + 1}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        position = ours.position
        if not isinstance(position, Sinusoidal) or not position.offset:
            return {}
        return {"pad_token_id": position.offset - 1}


@dataclass(frozen=True)
class NllbRouting(ConfigEntry):
    """NLLB-MoE's router: the second expert, weights, and capacity in evaluation.

    Expert outputs are multiplied by ``1 - moe_token_dropout`` there, which is our ``scale``. In
    training the capacity is fairseq's, ``2 ceil(T / E)``.
    """

    def read(self, theirs: Theirs) -> dict[str, Any]:
        policy = theirs.get("second_expert_policy", "all")
        if policy not in _SECOND:
            known = ", ".join(_SECOND)
            found = show_value(policy)
            raise ConfigError([f"second_expert_policy: found {found}, expected one of {known}"])
        share = theirs.get("moe_eval_capacity_token_fraction", 1.0)
        if share <= 0:
            raise ConfigError(
                [
                    f"moe_eval_capacity_token_fraction: found {show_value(share)}, expected a "
                    "positive one: a number of tokens as in their training depends on the batch"
                ]
            )
        first = "normalize_router_prob_before_dropping"
        by_token = theirs.get("batch_prioritized_routing", False)
        return {
            "moe.select.second": _SECOND[policy],
            "moe.select.normalise": "before" if theirs.get(first, False) else "after",
            "moe.select.scale": 1 - theirs.get("moe_token_dropout", 0.2),
            "moe.limit.priority": BatchPriority() if by_token else PositionPriority(),
            "moe.limit.eval_factor": None if share >= 1 else share * theirs["num_experts"] / 2,
        }

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        moe = ours.moe
        if not isinstance(moe, MoE) or not isinstance(moe.select, TopK | Top2):
            return {}
        keys: dict[str, Any] = {
            "normalize_router_prob_before_dropping": moe.select.normalise == "before",
            "moe_token_dropout": round(1 - moe.select.scale, 12),
            "moe_eval_capacity_token_fraction": 1.0,
        }
        if isinstance(moe.select, Top2):
            back = {ours: theirs for theirs, ours in _SECOND.items()}
            keys["second_expert_policy"] = back[moe.select.second]
        if isinstance(moe.limit, Capacity):
            keys["batch_prioritized_routing"] = isinstance(moe.limit.priority, BatchPriority)
            factor = moe.limit.eval_factor
            share = 1.0 if factor is None else 2 * factor / moe.experts
            keys["moe_eval_capacity_token_fraction"] = share
        return keys


@dataclass(frozen=True)
class RouterLosses(ConfigEntry):
    """``router_aux_loss_coef`` as the balance term ``balance``, and ``router_z_loss_coef``."""

    balance: type[FirstChoiceBalance | SequenceBalance]
    z_loss: bool = False

    def read(self, theirs: Theirs) -> dict[str, Any]:
        weight = theirs.get("router_aux_loss_coef", 0.001)
        terms: list[Balance] = [self.balance(weight=weight)] if weight else []
        z = theirs.get("router_z_loss_coef", 0.001) if self.z_loss else 0
        terms += [RouterZLoss(weight=z)] if z else []
        return {"moe.balance": [term.to_dict() for term in terms]}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        if not isinstance(ours.moe, MoE):
            return {}
        weights = {type(term): field_of(term, "weight") for term in ours.moe.balance}
        z = {"router_z_loss_coef": weights.get(RouterZLoss, 0.0)} if self.z_loss else {}
        return {"router_aux_loss_coef": weights.get(self.balance, 0.0)} | z


@dataclass(frozen=True)
class StackLayers(ConfigEntry):
    """Number of a stack's layers (``count``, or ``also``), and one that says which have experts.

    ``chosen`` returns their indices of both numbers.
    """

    side: str
    count: str
    number: str
    default: int
    chosen: Callable[[int, int], Sequence[int]]
    also: str = ""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        layers = theirs.get(self.count)
        layers = theirs.get(self.also) if layers is None else layers
        if type(layers) is not int or layers < 1:
            raise ConfigError([f"{self.count}: found {show_value(layers)}, expected a number"])
        sparse = self.chosen(layers, theirs.get(self.number, self.default))
        return {f"{self.side}.layers": layers, f"{self.side}.sparse_layers": sparse}

    @property
    def numbers(self) -> Mapping[str, str]:
        return {name: f"{self.side}.layers" for name in (self.count, self.also) if name}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        stack = ours.stack_of(self.side)
        numbers = range(stack.layers + 1)
        fitting = [n for n in numbers if self.chosen(stack.layers, n) == stack.moe_layers]
        return {self.count: stack.layers} | ({self.number: fitting[-1]} if fitting else {})


def every_nth(layers: int, step: int) -> Sequence[int]:
    """Return the last of each ``step`` layers: NLLB-MoE."""
    return Stack(layers=layers, moe_every=step).moe_layers


def second_of_step(layers: int, number: int) -> Sequence[int]:
    """Return each i with ``i % step == 1``, or all where the step is 1: Switch Transformers.

    The step is the layers divided by ``number``, as transformers computes it: of zero sparse layers
    it is all layers, and layer 1 has experts.
    """
    step = layers // number if number else layers
    return tuple(i for i in range(layers) if step == 1 or (step and i % step == 1))


@dataclass(frozen=True)
class TiedTable(ConfigEntry):
    """``tie_word_embeddings`` of T5: a tied table scores states divided by ``sqrt(dim)``.

    transformers 5 writes T5 1.1 as tied, and ``scale_decoder_outputs`` false, beside its own table.
    """

    def read(self, theirs: Theirs) -> dict[str, Any]:
        tied = all(theirs.get(n, True) for n in ("tie_word_embeddings", "scale_decoder_outputs"))
        factor = theirs["d_model"] ** 0.5 if tied else 1.0
        return {"embedding.tied": tied, "embedding.logits_scaling": factor}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        return {"tie_word_embeddings": ours.embedding.tied}
