"""Router settings: the parts of a run's config that health findings refer to, layer by layer.

Advice is a change of the config as ``--set`` takes it, so every key in it exists.
"""

import json
import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The settings of one MoE layer, and the paths of their keys in the run's config.

    ``moe`` is the path of the layer's config (``model.moe`` or ``model.decoder.moe``).
    ``balance_weight`` and ``z_weight`` are 0 where there is no such loss, ``bias_rate`` where no
    ``BiasUpdate`` balances. ``balance_terms`` are all terms as config text; ``balance_place``,
    ``z_place`` and ``bias_place`` the numbers of the (strongest) balance loss, of the z-loss and of
    the bias among them. ``capacity_factor`` is None for dropless routing. ``optimizer`` is the path
    of the optimizer that updates the router, ``router_lr`` its learning rate; ``lr`` is that of the
    matrices.
    """

    languages: tuple[str, ...]
    top_k: int = 1
    balance_weight: float = 0.0
    z_weight: float = 0.0
    capacity_factor: float | None = None
    bias_rate: float = 0.0
    balance_terms: tuple[str, ...] = ()
    balance_place: int = 0
    z_place: int = 0
    bias_place: int = 0
    moe: str = "model.moe"
    optimizer: str = "optimizer"
    lr: float = 1e-3
    router_lr: float = 1e-3

    def set_moe(self, key: str, value: str) -> str:
        """Return the change of a key of the layer's config."""
        return _set(f"{self.moe}.{key}", value)

    def set_balance_weight(self, weight: float) -> str:
        """Return the change of the (strongest) balance loss's weight."""
        return self.set_moe(f"balance.{self.balance_place}.weight", f"{weight:g}")

    def set_bias_rate(self, rate: float) -> str:
        """Return the change of the rate of ``BiasUpdate``."""
        return self.set_moe(f"balance.{self.bias_place}.rate", f"{rate:g}")

    def add_balance_term(self, term: str) -> str:
        """Return the change that adds a term, given as config text, to the layer's terms."""
        return self.set_moe("balance", json.dumps([*self.balance_terms, term]))

    def strengthen_z_loss(self) -> str:
        """Return the change that adds a z-loss, or triples the weight of the one there is."""
        if not self.z_weight:
            return self.add_balance_term("RouterZLoss(weight=0.001)")
        return self.set_moe(f"balance.{self.z_place}.weight", f"{3 * self.z_weight:g}")

    def enlarge_capacity(self) -> str:
        """Return the change to a larger capacity factor, or to no limit where there is none."""
        if self.capacity_factor is None:
            return self.set_moe("limit", "Dropless()")
        return self.set_moe("limit.factor", f"{max(1.25, 1.5 * self.capacity_factor):.2f}")

    def set_learning_rate(self, factor: float) -> str:
        """Return the change of the learning rate by a factor."""
        return _set("optimizer.lr", f"{factor * self.lr:.3g}")

    def set_router_learning_rate(self, factor: float) -> str:
        """Return the change of the routers' own learning rate by a factor."""
        return _set(f"{self.optimizer}.router_lr", f"{factor * self.router_lr:.3g}")


def _set(key: str, value: str) -> str:
    return f"--set {shlex.quote(f'{key}={value}')}"
