"""Router layers: the routed MoE layers of a run, each with its own config and health settings."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.model.config import ModelConfig
from moesaic.moe.auxiliary_losses import Balance, RouterZLoss
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity
from moesaic.monitor.router_settings import RouterSettings
from moesaic.optim.optimizer import AdamW, Muon, Optimizer
from moesaic.train.run import Run


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A layer's ``name`` in records, its own config, and the path of that config in the run."""

    name: str
    moe: MoE
    key: str


def routed_layers(model: ModelConfig) -> Iterator[RoutedLayer]:
    """Yield the layers that have a router, encoder first."""
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        key = "model.moe" if stack.moe is None else f"model.{side}.moe"
        for layer in stack.moe_layers:
            moe = model.routed_moe_of_layer(stack, layer=layer)
            if moe is not None:
                yield RoutedLayer(f"{side}.{layer}", moe, key)


def health_check_settings(run: Run, *, languages: tuple[str, ...]) -> dict[str, RouterSettings]:
    """Return what health findings refer to for causes and advice, by layer."""
    return {
        layer.name: _layer_settings(layer, languages=languages, optimizer=run.optimizer)
        for layer in routed_layers(run.model)
    }


def _layer_settings(
    layer: RoutedLayer, *, languages: tuple[str, ...], optimizer: Optimizer
) -> RouterSettings:
    moe = layer.moe
    terms, limit = moe.balance, moe.limit
    adamw = optimizer.adamw if isinstance(optimizer, Muon) else optimizer
    lr = optimizer.lr if isinstance(optimizer, Muon | AdamW) else 1e-3
    router_lr = (adamw.router_lr or adamw.lr) if isinstance(adamw, AdamW) else lr
    return RouterSettings(
        languages,
        top_k=max(1, round(moe.select.experts_per_token(moe.num_router_outputs))),
        balance_weight=sum(term.balancing_weight() for term in terms),
        z_weight=sum(term.weight for term in terms if isinstance(term, RouterZLoss)),
        capacity_factor=limit.factor if isinstance(limit, Capacity) else None,
        bias_rate=sum(term.rate for term in terms if isinstance(term, BiasUpdate)),
        balance_terms=tuple(repr(term) for term in terms),
        balance_place=_place(terms, [term.balancing_weight() for term in terms]),
        z_place=_place(terms, [isinstance(term, RouterZLoss) for term in terms]),
        bias_place=_place(terms, [isinstance(term, BiasUpdate) for term in terms]),
        moe=layer.key,
        optimizer="optimizer.adamw" if isinstance(optimizer, Muon) else "optimizer",
        lr=lr,
        router_lr=router_lr,
    )


def _place(terms: tuple[Balance, ...], values: list[float] | list[bool]) -> int:
    """Return the place of the largest value."""
    return max(range(len(terms)), key=lambda i: values[i], default=0)
